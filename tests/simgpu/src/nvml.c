/* The simulated libnvidia-ml.so.1: who holds how much memory on which board. It reads the boards alone
 * and asks no process, as the real one asks the kernel: it answers about processes that are locked or
 * frozen. An attached process without memory is listed with none; a checkpointed one is not listed. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "sim.h"

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, UNKNOWN = 999 };

/* nvmlProcessInfo_t, second version: as the _v3 of the call has it */
struct info {
    unsigned int pid;
    unsigned long long used;
    unsigned int gpu_instance, compute_instance;
};

static atomic_int initialised;

int nvmlInit_v2(void)
{
    initialised++;
    return OK;
}

int nvmlShutdown(void)
{
    return initialised-- > 0 ? OK : UNINITIALIZED;
}

const char *nvmlErrorString(int code)
{
    return code == UNINITIALIZED ? "Uninitialized" : code == OK ? "Success" : "simulated error";
}

static int open_table(unsigned int board, struct sim_header *header)
{
    const char *dir = getenv("SIMGPU_DIR");
    char path[256];
    snprintf(path, sizeof path, "%s/gpu%u/table", dir ? dir : SIM_BOARDS, board);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 && pread(fd, header, sizeof *header, 0) != (ssize_t)sizeof *header) {
        close(fd);
        return -1;
    }
    return fd;
}

int nvmlDeviceGetCount_v2(unsigned int *count)
{
    struct sim_header header;
    if (!initialised)
        return UNINITIALIZED;
    for (*count = 0; *count < SIM_MAX_GPUS; (*count)++) {
        int fd = open_table(*count, &header);
        if (fd < 0)
            break;
        close(fd);
    }
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device)
{
    unsigned int count;
    int rc = nvmlDeviceGetCount_v2(&count);
    if (rc != OK || index >= count)
        return rc != OK ? rc : INVALID_ARGUMENT;
    *device = (void *)(uintptr_t)(index + 1);
    return OK;
}

/* The caller's pid of the slot's owner; 0 = nobody. */
static pid_t owner(int table, unsigned int slot)
{
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = SIM_OWNER_BYTE + slot, .l_len = 1};
    return fcntl(table, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK ? lock.l_pid : 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, struct info *infos)
{
    struct sim_header header;
    unsigned int found = 0, room = *count;
    if (!initialised)
        return UNINITIALIZED;
    int fd = open_table((unsigned int)((uintptr_t)device - 1), &header);
    uint32_t *table = fd < 0 ? NULL : calloc(header.npages, sizeof *table);
    size_t bytes = table ? header.npages * sizeof *table : 0;
    if (!table || pread(fd, table, bytes, SIM_TABLE) != (ssize_t)bytes)
        return UNKNOWN;
    for (unsigned int slot = 1; slot <= SIM_MAX_OWNERS; slot++) {
        pid_t pid = owner(fd, slot);
        if (pid && found++ < room) {
            infos[found - 1] = (struct info){.pid = (unsigned int)pid};
            for (uint32_t page = 0; page < header.npages; page++)
                infos[found - 1].used += table[page] == slot ? SIM_PAGE : 0;
        }
    }
    free(table);
    close(fd);
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
