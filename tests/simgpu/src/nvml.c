/* The simulated libnvidia-ml.so.1: who holds how much memory on which board. It reads the boards alone
 * and asks no process, as the real one asks the kernel: it answers about processes that are locked or
 * frozen. An attached process without memory is listed with none; a checkpointed one is not listed.
 * With the word "mig" or "mps" in the boards' file `mode` it says of every process that it runs on a
 * MIG instance, or as a client of MPS. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, UNKNOWN = 999 };

#define NO_INSTANCE 0xffffffffu

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

static const char *boards(void)
{
    const char *dir = getenv("SIMGPU_DIR");
    return dir ? dir : SIM_BOARDS;
}

static bool mode_is(const char *word)
{
    char path[256], words[64] = "";
    snprintf(path, sizeof path, "%s/mode", boards());
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, words, sizeof words - 1);
    close(fd);
    return n > 0 && strstr(words, word);
}

static int open_table(unsigned int board, struct sim_header *header)
{
    char path[256];
    snprintf(path, sizeof path, "%s/gpu%u/table", boards(), board);
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

/* The board's owner table, for the caller to free, and its open file; NULL if it cannot be read. */
static uint32_t *read_table(void *device, int *fd, struct sim_header *header)
{
    *fd = open_table((unsigned int)((uintptr_t)device - 1), header);
    if (*fd < 0)
        return NULL;
    uint32_t *table = calloc(header->npages, sizeof *table);
    size_t bytes = header->npages * sizeof *table;
    if (table && pread(*fd, table, bytes, SIM_TABLE) == (ssize_t)bytes)
        return table;
    free(table);
    close(*fd);
    return NULL;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length)
{
    struct sim_header h;
    int fd = open_table((unsigned int)((uintptr_t)device - 1), &h);
    if (fd < 0)
        return UNKNOWN;
    close(fd);
    int at = snprintf(uuid, length, "GPU-");
    for (int i = 0; i < 16; i++)
        at += snprintf(uuid + at, length - (unsigned)at, "%s%02x",
                       i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", h.uuid[i]);
    return OK;
}

int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory)
{
    struct sim_header header;
    int fd;
    uint32_t *table = read_table(device, &fd, &header);
    if (!table)
        return UNKNOWN;
    memory[0] = (unsigned long long)header.npages * SIM_PAGE;
    memory[2] = 0;
    for (uint32_t page = 0; page < header.npages; page++)
        if (table[page] && owner(fd, table[page]))
            memory[2] += SIM_PAGE;
    memory[1] = memory[0] - memory[2];
    free(table);
    close(fd);
    return OK;
}

int nvmlDeviceGetMigMode(void *device, unsigned int *now, unsigned int *later)
{
    (void)device;
    *now = *later = mode_is("mig");
    return OK;
}

static int list(void *device, unsigned int *count, struct info *infos)
{
    struct sim_header header;
    unsigned int found = 0, room = *count;
    unsigned int instance = mode_is("mig") ? 1 : NO_INSTANCE;
    int fd;
    if (!initialised)
        return UNINITIALIZED;
    uint32_t *table = read_table(device, &fd, &header);
    if (!table)
        return UNKNOWN;
    for (unsigned int slot = 1; slot <= SIM_MAX_OWNERS; slot++) {
        pid_t pid = owner(fd, slot);
        if (pid && found++ < room) {
            infos[found - 1] = (struct info){(unsigned int)pid, 0, instance, instance};
            for (uint32_t page = 0; page < header.npages; page++)
                infos[found - 1].used += table[page] == slot ? SIM_PAGE : 0;
        }
    }
    free(table);
    close(fd);
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}

static int none(unsigned int *count)
{
    *count = 0;
    return initialised ? OK : UNINITIALIZED;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, struct info *infos)
{
    return mode_is("mps") ? none(count) : list(device, count, infos);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *device, unsigned int *count, struct info *infos)
{
    return mode_is("mps") ? list(device, count, infos) : none(count);
}
