/* The calls about another process: find its driver's mailbox in its memory, queue, speak, wait for the
 * answer. The pid is the caller's own number for the process, so this works across pid and mount
 * namespaces. There is no limit to the wait: while the other process stands still it has no end, as
 * was measured with the real driver (timeoutMs is the lock's own and starts when it is heard). */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/uio.h>

#include "sim.h"

static bool peek(int pid, uint64_t addr, void *buf, size_t n)
{
    struct iovec local = {buf, n}, remote = {(void *)(uintptr_t)addr, n};
    return process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)n;
}

static bool poke(int pid, uint64_t addr, const void *buf, size_t n)
{
    struct iovec local = {(void *)(uintptr_t)buf, n}, remote = {(void *)(uintptr_t)addr, n};
    return process_vm_writev(pid, &local, 1, &remote, 1, 0) == (ssize_t)n;
}

static CUresult find_mailbox(int pid, uint64_t *addr)
{
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    FILE *maps = fopen(path, "re");
    if (!maps)
        return CUDA_ERROR_INVALID_VALUE;
    *addr = 0;
    while (*addr == 0 && fgets(line, sizeof line, maps)) {
        uint64_t start, end;
        char perms[5];
        const char *name = strstr(line, "/libcuda.so");
        if (!name || sscanf(line, "%lx-%lx %4s", &start, &end, perms) != 3 ||
            strncmp(perms, "rw", 2) != 0)
            continue;
        for (uint64_t at = start; at < end && *addr == 0; at += 4096) {
            char magic[16];
            if (peek(pid, at, magic, sizeof magic) && memcmp(magic, MAIL_MAGIC, 16) == 0)
                *addr = at;
        }
    }
    fclose(maps);
    return *addr ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

/* Last number on the line of a /proc status file that starts with `key`; 0 = cannot be read. For
 * NSpid that is the id in the innermost namespace. */
static int status_number(const char *status_path, const char *key)
{
    char line[512];
    int id = 0;
    FILE *status = fopen(status_path, "re");
    if (!status)
        return 0;
    while (id == 0 && fgets(line, sizeof line, status))
        if (strncmp(line, key, strlen(key)) == 0) {
            const char *last = strrchr(line, '\t');
            id = last ? atoi(last + 1) : 0;
        }
    fclose(status);
    return id;
}

/* The caller's id of the thread that calls itself `inner`; 0 when there is none: a child of fork has
 * its parent's memory, mailbox and all, but no driver thread. */
static int outer_tid(int pid, int inner)
{
    char path[320];
    int tid = 0;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    if (!tasks)
        return 0;
    for (struct dirent *e; tid == 0 && (e = readdir(tasks));) {
        snprintf(path, sizeof path, "/proc/%d/task/%s/status", pid, e->d_name);
        if (e->d_name[0] != '.' && status_number(path, "NSpid:") == inner)
            tid = atoi(e->d_name);
    }
    closedir(tasks);
    return tid;
}

/* Finds a process whose CUDA is initialised; *tid is its driver thread. `pid` may be any thread of
 * it: CRIU's plugin asks by the restore thread's id. */
static CUresult find_driver(int pid, uint64_t *mailbox, int *tid)
{
    int32_t ids[2]; /* pid, driver_tid */
    char path[64];

    if (pid <= 0 || (kill(pid, 0) != 0 && errno == ESRCH))
        return CUDA_ERROR_INVALID_VALUE;
    CUresult rc = find_mailbox(pid, mailbox);
    if (rc != CUDA_SUCCESS)
        return rc;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    if ((pid = status_number(path, "Tgid:")) == 0)
        return CUDA_ERROR_INVALID_VALUE;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    if (!peek(pid, *mailbox + offsetof(struct mailbox, pid), ids, sizeof ids) || ids[0] == 0 ||
        ids[0] != status_number(path, "NSpid:") || (*tid = outer_tid(pid, ids[1])) == 0)
        return CUDA_ERROR_NOT_INITIALIZED;
    return CUDA_SUCCESS;
}

static uint64_t new_ticket(unsigned *slot)
{
    uint64_t ticket = 0;
    while (ticket == 0)
        if (getrandom(&ticket, sizeof ticket, 0) != (ssize_t)sizeof ticket)
            ticket = 0;
    *slot = (unsigned)(ticket % MAIL_SLOTS);
    return ticket;
}

static CUresult ask(int pid, struct mail_call *call, uint32_t *state)
{
    static const uint64_t none = 0;
    uint64_t box, ticket;
    unsigned slot;
    int tid;
    bool queued = false, spoken = false;

    CUresult rc = find_driver(pid, &box, &tid);
    if (rc != CUDA_SUCCESS)
        return rc;
    ticket = new_ticket(&slot);
    for (;;) {
        uint64_t place = box + offsetof(struct mailbox, queue) + slot * sizeof(uint64_t);
        uint64_t in_slot, serving;
        struct mail_answer answer;

        /* In this order: the driver answers first and only then stops serving. */
        if (!peek(pid, place, &in_slot, sizeof in_slot) ||
            !peek(pid, box + offsetof(struct mailbox, serving), &serving, sizeof serving) ||
            !peek(pid, box + offsetof(struct mailbox, answers) + slot * sizeof answer, &answer,
                  sizeof answer))
            return CUDA_ERROR_OPERATING_SYSTEM; /* it died, or became another program */
        if (queued && answer.ticket == ticket) {
            poke(pid, place, &none, sizeof none);
            if (state)
                *state = answer.state;
            return (CUresult)answer.result;
        }
        if (queued && in_slot == ticket) {
            if (serving == ticket && !spoken) {
                call->ticket = ticket;
                poke(pid, box + offsetof(struct mailbox, call), call,
                     offsetof(struct mail_call, ticket));
                poke(pid, box + offsetof(struct mailbox, call) + offsetof(struct mail_call, ticket),
                     &call->ticket, sizeof call->ticket);
                spoken = true;
            }
        } else if (queued || in_slot != 0) {
            /* Someone else's slot, or we were called and not there in time: queue anew. */
            ticket = new_ticket(&slot);
            queued = spoken = false;
            continue;
        } else {
            poke(pid, place, &ticket, sizeof ticket);
            queued = true;
        }
        sim_nap_us(50);
    }
}

static bool all_zero(const void *bytes, size_t n)
{
    const char *p = bytes;
    while (n && *p == 0)
        p++, n--;
    return n == 0;
}

CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    uint64_t box;
    if (!tid)
        return CUDA_ERROR_INVALID_VALUE;
    return find_driver(pid, &box, tid);
}

CUresult cuCheckpointProcessGetState(int pid, CUprocessState *state)
{
    struct mail_call call = {.op = OP_GETSTATE};
    uint32_t now;
    if (!state)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult rc = ask(pid, &call, &now);
    if (rc == CUDA_SUCCESS)
        *state = (CUprocessState)now;
    return rc;
}

CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *args)
{
    struct mail_call call = {.op = OP_LOCK};
    if (args) {
        if (args->reserved0 || !all_zero(args->reserved1, sizeof args->reserved1))
            return CUDA_ERROR_INVALID_VALUE;
        call.timeout_ms = args->timeoutMs;
    }
    return ask(pid, &call, NULL);
}

CUresult cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs *args)
{
    struct mail_call call = {.op = OP_CHECKPOINT};
    if (args && !all_zero(args, sizeof *args))
        return CUDA_ERROR_INVALID_VALUE;
    return ask(pid, &call, NULL);
}

CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args)
{
    struct mail_call call = {.op = OP_RESTORE};
    if (args) {
        if (args->gpuPairsCount > MAIL_PAIRS || (args->gpuPairsCount && !args->gpuPairs) ||
            !all_zero(args->reserved, sizeof args->reserved))
            return CUDA_ERROR_INVALID_VALUE;
        call.npairs = args->gpuPairsCount;
        for (unsigned i = 0; i < call.npairs; i++)
            call.pairs[i] = args->gpuPairs[i];
    }
    return ask(pid, &call, NULL);
}

CUresult cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *args)
{
    struct mail_call call = {.op = OP_UNLOCK};
    if (args && !all_zero(args, sizeof *args))
        return CUDA_ERROR_INVALID_VALUE;
    return ask(pid, &call, NULL);
}

CUresult simgpuTokenOf(int pid, char token[33])
{
    uint64_t box;
    int tid;
    CUresult rc = find_driver(pid, &box, &tid);
    if (rc != CUDA_SUCCESS)
        return rc;
    return peek(pid, box + offsetof(struct mailbox, token), token, 33) ? CUDA_SUCCESS
                                                                       : CUDA_ERROR_OPERATING_SYSTEM;
}
