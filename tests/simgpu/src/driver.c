/* The driver thread: serves the calls other processes make about this one, and so answers only while
 * it runs. It alone changes the process's state. Must never take a lock, the heap or stdio, since
 * every other thread may be stopped anywhere while it works. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sim.h"

/* A page of its own, so that a caller finds it by looking at the start of each page. */
__attribute__((section(".simgpu_mailbox"), aligned(4096)))
volatile struct mailbox sim_mailbox = {.magic = MAIL_MAGIC};

enum { IDLE_NAP_US = 1000, SPEAK_LIMIT_MS = 250, KEEP_ANSWER_MS = 2000, GUARD = 4096 };

static char *region; /* device memory while checkpointed: one private anonymous mapping */
static size_t region_bytes;

uint64_t sim_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void sim_nap_us(unsigned us)
{
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = (us % 1000000) * 1000L};
    nanosleep(&t, NULL);
}

static CUresult op_lock(uint32_t timeout_ms, struct fault fault)
{
    uint64_t deadline = sim_now_ns() + timeout_ms * 1000000ull;

    if (sim_mailbox.state != CU_PROCESS_STATE_RUNNING)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (fault.kind == FAULT_CODE)
        return fault.code;
    gate_shut();
    while (!gate_idle() || fault.kind == FAULT_NEVER) {
        if (timeout_ms && sim_now_ns() >= deadline) {
            gate_open();
            return CUDA_ERROR_NOT_READY;
        }
        sim_nap_us(200);
        if (fault.kind == FAULT_NEVER)
            fault = faults_read().op[OP_LOCK];
    }
    gate_forget_launches();
    sim_mailbox.state = CU_PROCESS_STATE_LOCKED;
    return CUDA_SUCCESS;
}

/* The region, all of it made at once, as NVIDIA's driver has it (r580), between two guard pages so
 * that it never merges with a neighbour. A hidden one is no memory of the process's own, as that of a
 * driver that keeps the copy elsewhere. */
static bool region_map(size_t bytes, bool hidden)
{
    int kind = hidden ? MAP_SHARED : MAP_PRIVATE;
    char *base = mmap(NULL, bytes + 2 * GUARD, PROT_NONE, kind | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return false;
    if (mmap(base + GUARD, bytes, PROT_READ | PROT_WRITE,
             kind | MAP_ANONYMOUS | MAP_FIXED | MAP_POPULATE, -1, 0) == MAP_FAILED) {
        munmap(base, bytes + 2 * GUARD);
        return false;
    }
    region = base + GUARD;
    region_bytes = bytes;
    return true;
}

static void region_unmap(void)
{
    munmap(region - GUARD, region_bytes + 2 * GUARD);
    region = NULL;
}

static size_t mapped_bytes(void)
{
    size_t bytes = 0;
    for (int i = 0; i < SIM_MAX_GPUS; i++)
        for (uint32_t d = 0; sim_gpus[i].used && d < SIM_MAX_PAGES; d++)
            bytes += sim_gpus[i].pages[d] ? SIM_PAGE : 0;
    return bytes;
}

/* Moves all device memory between the boards and the region, `limit` bytes at most, at `speed`. */
static CUresult copy_all(bool to_device, size_t limit, uint64_t speed)
{
    uint64_t start = sim_now_ns();
    size_t done = 0;

    for (int i = 0; i < SIM_MAX_GPUS; i++)
        for (uint32_t d = 0; sim_gpus[i].used && d < SIM_MAX_PAGES && done < limit; d++) {
            if (sim_gpus[i].pages[d] == 0)
                continue;
            CUresult rc = board_copy(&sim_gpus[i], (uint64_t)d * SIM_PAGE, region + done, SIM_PAGE,
                                     to_device);
            if (rc != CUDA_SUCCESS)
                return rc;
            done += SIM_PAGE;
            while (speed && (sim_now_ns() - start) / 1e9 < (double)done / (double)speed)
                sim_nap_us(1000);
        }
    return CUDA_SUCCESS;
}

static void detach_all(void)
{
    for (int i = 0; i < SIM_MAX_GPUS; i++)
        if (sim_gpus[i].used)
            board_detach(&sim_gpus[i]);
}

/* The fault's error, and the state FAILED where the fault says that nothing can be done any more. */
static CUresult fail(struct fault fault)
{
    if (fault.kind == FAULT_FAILED)
        sim_mailbox.state = CU_PROCESS_STATE_FAILED;
    return fault.code;
}

static CUresult op_checkpoint(struct fault fault, uint64_t speed)
{
    if (sim_mailbox.state != CU_PROCESS_STATE_LOCKED)
        return CUDA_ERROR_ILLEGAL_STATE;
    size_t bytes = mapped_bytes();
    if (!region_map(bytes ? bytes : SIM_PAGE, fault.kind == FAULT_HIDDEN))
        return CUDA_ERROR_OPERATING_SYSTEM;
    if (fault.kind == FAULT_HIDDEN)
        fault.kind = FAULT_NONE;
    CUresult rc = copy_all(false, fault.kind ? bytes / 2 : bytes, speed);
    if (rc == CUDA_SUCCESS && fault.kind)
        rc = fail(fault);
    if (rc != CUDA_SUCCESS) {
        region_unmap();
        return rc;
    }
    detach_all();
    sim_mailbox.state = CU_PROCESS_STATE_CHECKPOINTED;
    return CUDA_SUCCESS;
}

/* The board a GPU comes back on; INVALID_VALUE when pairs are given but leave this GPU out. */
static CUresult new_uuid(const uint8_t old[16], const struct mail_call *call, uint8_t out[16])
{
    memcpy(out, old, 16);
    if (call->npairs == 0)
        return CUDA_SUCCESS;
    for (uint32_t i = 0; i < call->npairs; i++)
        if (memcmp(call->pairs[i].oldUuid.bytes, old, 16) == 0) {
            memcpy(out, call->pairs[i].newUuid.bytes, 16);
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

static CUresult attach_all(const struct mail_call *call)
{
    uint8_t uuids[SIM_MAX_GPUS][16];

    for (int i = 0; i < SIM_MAX_GPUS; i++) {
        if (!sim_gpus[i].used)
            continue;
        CUresult rc = new_uuid(sim_gpus[i].uuid, call, uuids[i]);
        if (rc != CUDA_SUCCESS)
            return rc;
        for (int j = 0; j < i; j++)
            if (sim_gpus[j].used && memcmp(uuids[j], uuids[i], 16) == 0)
                return CUDA_ERROR_INVALID_VALUE;
    }
    int boards[SIM_MAX_GPUS];
    for (int i = 0; i < SIM_MAX_GPUS; i++)
        if (sim_gpus[i].used && (boards[i] = board_find(uuids[i])) < 0)
            return CUDA_ERROR_INVALID_DEVICE;
    for (int i = 0; i < SIM_MAX_GPUS; i++) {
        if (!sim_gpus[i].used)
            continue;
        CUresult rc = board_attach(&sim_gpus[i], boards[i]);
        if (rc == CUDA_SUCCESS)
            rc = board_take_mapped(&sim_gpus[i]);
        if (rc != CUDA_SUCCESS)
            return rc;
    }
    return CUDA_SUCCESS;
}

static CUresult op_restore(const struct mail_call *call, struct fault fault, uint64_t speed)
{
    static bool ran_out; /* no restore works after one that did (H100, r580) */
    uint8_t old[SIM_MAX_GPUS][16];

    if (sim_mailbox.state != CU_PROCESS_STATE_CHECKPOINTED)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (ran_out)
        return CUDA_ERROR_OPERATING_SYSTEM;
    for (int i = 0; i < SIM_MAX_GPUS; i++)
        memcpy(old[i], sim_gpus[i].uuid, 16);
    size_t bytes = mapped_bytes();
    CUresult rc = attach_all(call);
    ran_out = rc == CUDA_ERROR_OUT_OF_MEMORY;
    if (rc == CUDA_SUCCESS)
        rc = copy_all(true, fault.kind ? bytes / 2 : bytes, speed);
    if (rc == CUDA_SUCCESS && fault.kind)
        rc = fail(fault);
    if (rc != CUDA_SUCCESS) {
        detach_all();
        for (int i = 0; i < SIM_MAX_GPUS; i++)
            memcpy(sim_gpus[i].uuid, old[i], 16);
        return rc;
    }
    region_unmap();
    sim_mailbox.state = CU_PROCESS_STATE_LOCKED;
    return CUDA_SUCCESS;
}

static CUresult op_unlock(struct fault fault)
{
    if (sim_mailbox.state != CU_PROCESS_STATE_LOCKED)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (fault.kind)
        return fail(fault);
    sim_mailbox.state = CU_PROCESS_STATE_RUNNING;
    gate_open();
    return CUDA_SUCCESS;
}

/* True when the call was carried out; false when a hang ended and the caller must ask again. */
static bool carry_out(const struct mail_call *call, CUresult *result)
{
    struct faults faults = faults_read();
    struct fault fault = call->op < OP_ALLOC ? faults.op[call->op] : (struct fault){0};

    if (fault.kind == FAULT_HANG) {
        do
            sim_nap_us(5000);
        while (faults_read().op[call->op].kind == FAULT_HANG);
        return false;
    }
    switch (call->op) {
    case OP_GETSTATE:
        *result = fault.kind ? fault.code : CUDA_SUCCESS;
        break;
    case OP_LOCK:
        *result = op_lock(call->timeout_ms, fault);
        break;
    case OP_CHECKPOINT:
        *result = op_checkpoint(fault, faults.speed);
        break;
    case OP_RESTORE:
        *result = op_restore(call, fault, faults.speed);
        break;
    case OP_UNLOCK:
        *result = op_unlock(fault);
        break;
    default:
        *result = CUDA_ERROR_NOT_SUPPORTED;
    }
    return true;
}

/* Calls one ticket; the caller must speak soon, or it is gone and its call with it. */
static void serve(unsigned slot, uint64_t ticket)
{
    uint64_t limit = sim_now_ns() + SPEAK_LIMIT_MS * 1000000ull;
    struct mail_call call;
    CUresult result;

    sim_mailbox.serving = ticket;
    while (sim_mailbox.call.ticket != ticket) {
        if (sim_now_ns() >= limit) {
            sim_mailbox.queue[slot] = 0;
            sim_mailbox.serving = 0;
            return;
        }
        sim_nap_us(20);
    }
    atomic_thread_fence(memory_order_seq_cst);
    memcpy(&call, (const void *)&sim_mailbox.call, sizeof call);
    if (carry_out(&call, &result)) {
        sim_mailbox.answers[slot].result = result;
        sim_mailbox.answers[slot].state = sim_mailbox.state;
        atomic_thread_fence(memory_order_seq_cst);
        sim_mailbox.answers[slot].ticket = ticket;
    } else {
        sim_mailbox.queue[slot] = 0;
    }
    atomic_thread_fence(memory_order_seq_cst);
    sim_mailbox.serving = 0;
}

static void *driver_main(void *arg)
{
    static uint64_t answered_at[MAIL_SLOTS];
    (void)arg;
    prctl(PR_SET_NAME, "simgpu-driver");
    sim_mailbox.driver_tid = (int32_t)syscall(SYS_gettid);
    for (;;) {
        bool served = false;
        for (unsigned slot = 0; slot < MAIL_SLOTS; slot++) {
            uint64_t ticket = sim_mailbox.queue[slot];
            if (ticket == 0)
                continue;
            if (sim_mailbox.answers[slot].ticket == ticket) {
                /* Its caller died before it read the answer: give the slot to others. */
                if (sim_now_ns() - answered_at[slot] > KEEP_ANSWER_MS * 1000000ull)
                    sim_mailbox.queue[slot] = 0;
                continue;
            }
            serve(slot, ticket);
            answered_at[slot] = sim_now_ns();
            served = true;
        }
        if (!served)
            sim_nap_us(IDLE_NAP_US);
    }
    return NULL;
}

CUresult driver_start(void)
{
    pthread_t thread;
    sigset_t every, before;

    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    int rc = pthread_create(&thread, NULL, driver_main, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0)
        return CUDA_ERROR_OPERATING_SYSTEM;
    pthread_detach(thread);
    while (sim_mailbox.driver_tid == 0)
        sim_nap_us(50);
    sim_mailbox.state = CU_PROCESS_STATE_RUNNING;
    sim_mailbox.pid = getpid();
    return CUDA_SUCCESS;
}
