/* talk: two processes, in two containers of a pod, that pass a number to and fro through one TCP
 * connection on the pod's loopback. A connection that is lost or a number that is not the next one
 * is told, and ends the process.
 *
 *     talk listen|connect PORT
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int first = !strcmp(argv[1], "connect");
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int s = socket(AF_INET, SOCK_STREAM, 0);
    if (first) {
        while (connect(s, (struct sockaddr *)&name, sizeof name)) {
            close(s);
            usleep(10000); /* nobody listens yet */
            s = socket(AF_INET, SOCK_STREAM, 0);
        }
    } else {
        int door = s;
        if (bind(door, (struct sockaddr *)&name, sizeof name) || listen(door, 1) ||
            (s = accept(door, NULL, NULL)) < 0) {
            perror("LOST: listen");
            return 1;
        }
        close(door);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (long mine = 0, theirs;; mine++) {
        if (first && send(s, &mine, sizeof mine, MSG_NOSIGNAL) != sizeof mine)
            break;
        ssize_t got;
        while ((got = recv(s, &theirs, sizeof theirs, MSG_WAITALL)) < 0 && errno == EINTR)
            ; /* a checkpoint interrupts it */
        if (got != sizeof theirs)
            break;
        if (theirs != mine) {
            printf("LOST: mine %ld, theirs %ld\n", mine, theirs);
            return 1;
        }
        if (!first && send(s, &mine, sizeof mine, MSG_NOSIGNAL) != sizeof mine)
            break;
        if (mine % 20 == 0)
            printf("%ld\n", mine);
        usleep(1000);
    }
    printf("LOST: %s\n", errno ? strerror(errno) : "closed");
    return 1;
}
