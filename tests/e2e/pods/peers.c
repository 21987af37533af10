/* peers: two processes, in two containers of a pod, that share what CRIU cannot save for one of them.
 *
 *     peers sysv            maps a SysV segment of a key that both know
 *     peers listen PATH     accepts one connection on a unix stream socket
 *     peers connect PATH    connects to it
 *
 * Each says "ready" when it has what it shares, then a dot every 50 ms. */
#include <stdio.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int die(const char *what)
{
    perror(what);
    return 1;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "sysv")) {
        int id = shmget(0x67726974, 4096, IPC_CREAT | 0666);
        char *memory = id < 0 ? (void *)-1 : shmat(id, NULL, 0);
        if (memory == (void *)-1)
            return die("shm");
        memory[0] = 1;
    } else if (argc == 3) {
        struct sockaddr_un name = {.sun_family = AF_UNIX};
        strncpy(name.sun_path, argv[2], sizeof name.sun_path - 1);
        int s = socket(AF_UNIX, SOCK_STREAM, 0);
        if (s < 0)
            return die("socket");
        if (!strcmp(argv[1], "listen")) {
            if (bind(s, (struct sockaddr *)&name, sizeof name) || listen(s, 1))
                return die("listen");
            if (accept(s, NULL, NULL) < 0)
                return die("accept");
        } else {
            while (connect(s, (struct sockaddr *)&name, sizeof name))
                usleep(10000); /* nobody listens yet */
        }
    } else {
        return 2;
    }
    for (puts("ready");; puts(".")) {
        fflush(stdout);
        usleep(50000);
    }
}
