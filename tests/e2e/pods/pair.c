/* pair: two processes, in two containers of a pod, that pass a number to and fro through a socket in
 * a shared directory, and note it in shared memory and in a shared file. Each holds what it did last
 * in its own memory. If the two, or what they share, were saved at different instants, the number
 * is lost or passed twice, and the one that notices says so and ends.
 *
 *     pair a|b MEMORY DIRECTORY
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void die(const char *what, long mine, long shared)
{
    printf("DISAGREE: %s: mine %ld, shared %ld\n", what, mine, shared);
    exit(1);
}

static struct sockaddr_un address(const char *directory, const char *role)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    snprintf(name.sun_path, sizeof name.sun_path, "%s/%s.sock", directory, role);
    return name;
}

static long noted(const char *path)
{
    long value = 0;
    int fd = open(path, O_RDONLY | O_CREAT, 0644);
    if (fd < 0 || pread(fd, &value, sizeof value, 0) < 0)
        die(path, -1, -1);
    close(fd);
    return value;
}

static void note(const char *path, long value)
{
    int fd = open(path, O_WRONLY | O_CREAT, 0644);
    if (fd < 0 || pwrite(fd, &value, sizeof value, 0) != sizeof value)
        die(path, value, -1);
    close(fd);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    int second = argv[1][0] == 'b';
    char mine_file[256];
    snprintf(mine_file, sizeof mine_file, "%s/%s.count", argv[3], argv[1]);
    int fd = open(argv[2], O_RDWR | O_CREAT, 0666);
    if (fd < 0 || ftruncate(fd, 4096))
        die("shared memory", -1, -1);
    volatile long *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    struct sockaddr_un mine = address(argv[3], argv[1]);
    struct sockaddr_un other = address(argv[3], second ? "a" : "b");
    int s = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (s < 0 || bind(s, (struct sockaddr *)&mine, sizeof mine))
        die("socket", -1, -1);
    long done = 0, token = 0;
    for (;;) {
        if (second || done) {
            if (recv(s, &token, sizeof token, 0) != sizeof token)
                continue; /* a checkpoint interrupts it */
            if (token != (second ? done + 1 : done))
                die("token", done, token);
        }
        if (memory[second] != done)
            die("shared memory", done, memory[second]);
        if (noted(mine_file) != done)
            die("shared file", done, noted(mine_file));
        done++;
        memory[second] = done;
        note(mine_file, done);
        token = done;
        while (sendto(s, &token, sizeof token, 0, (struct sockaddr *)&other, sizeof other) < 0)
            usleep(1000); /* the other is not there yet */
        if (done % 100 == 0) {
            printf("%ld\n", done);
            fflush(stdout);
        }
        usleep(500);
    }
}
