/* The calls an application makes: devices, contexts, memory, launches. Each waits at the gate while
 * the GPU is locked. Never changes the process's checkpoint state: that is the driver thread's. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "sim.h"

enum { MAX_CONTEXTS = 64, MAX_ALLOCATIONS = 1024 };
#define DEVICE_BASE 0x7e0000000000ull /* of GPU 0; each next one 1 TiB further */
#define DEVICE_SPAN (1ull << 40)

struct CUctx_st {
    bool used;
    CUdevice device;
};

static struct allocation {
    CUcontext ctx;
    CUdeviceptr ptr;
    uint32_t first, count; /* device pages */
} allocations[MAX_ALLOCATIONS];

static struct CUctx_st contexts[MAX_CONTEXTS];
static _Thread_local CUcontext current;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static bool initialised, forked;

/* A child of fork has the parent's memory but neither its driver thread nor its GPU. */
static void after_fork_in_child(void)
{
    if (!initialised)
        return;
    board_close_inherited();
    sim_mailbox.pid = 0;
    sim_mailbox.driver_tid = 0;
    initialised = false;
    forked = true;
}

static void choose_token(char token[33])
{
    uint8_t bytes[16];
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes)
        abort();
    for (int i = 0; i < 16; i++)
        snprintf(token + 2 * i, 3, "%02x", bytes[i]);
}

static void detach_boards(void)
{
    for (int i = 0; i < SIM_MAX_GPUS; i++)
        if (sim_gpus[i].used) {
            board_detach(&sim_gpus[i]);
            sim_gpus[i].used = false;
        }
}

static CUresult attach_boards(void)
{
    int found = 0;
    for (int board = 0; board < SIM_MAX_GPUS; board++) {
        CUresult rc = board_attach(&sim_gpus[found], board);
        if (rc == CUDA_SUCCESS)
            found++;
        else if (rc != CUDA_ERROR_NO_DEVICE) {
            detach_boards();
            return rc;
        }
    }
    return found ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

CUresult cuInit(unsigned int flags)
{
    static bool fork_handler;
    char token[33];
    CUresult rc = CUDA_SUCCESS;

    if (flags)
        return CUDA_ERROR_INVALID_VALUE;
    if (forked)
        return CUDA_ERROR_NOT_INITIALIZED;
    pthread_mutex_lock(&mutex);
    if (!initialised) {
        const char *dir = getenv("SIMGPU_DIR");
        choose_token(token);
        memcpy((void *)sim_mailbox.token, token, sizeof token);
        board_configure(dir, getenv("SIMGPU_DEV_PREFIX"));
        faults_configure(dir, token, getenv("SIMGPU_FAULTS"));
        rc = attach_boards();
        if (rc == CUDA_SUCCESS && (rc = driver_start()) != CUDA_SUCCESS)
            detach_boards();
        if (rc == CUDA_SUCCESS) {
            initialised = true;
            if (!fork_handler)
                pthread_atfork(NULL, NULL, after_fork_in_child);
            fork_handler = true;
        }
    }
    pthread_mutex_unlock(&mutex);
    return rc;
}

CUresult cuDriverGetVersion(int *version)
{
    if (!version)
        return CUDA_ERROR_INVALID_VALUE;
    *version = 13000;
    return CUDA_SUCCESS;
}

static const struct {
    CUresult code;
    const char *name, *text;
} errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM",
     "OS call failed or operation not supported on this OS"},
    {CUDA_ERROR_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE",
     "the operation cannot be performed in the present state"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static int error_index(CUresult error)
{
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++)
        if (errors[i].code == error)
            return (int)i;
    return -1;
}

CUresult cuGetErrorName(CUresult error, const char **name)
{
    int i = error_index(error);
    *name = i < 0 ? NULL : errors[i].name;
    return i < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    int i = error_index(error);
    *text = i < 0 ? NULL : errors[i].text;
    return i < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static bool is_device(CUdevice device)
{
    return device >= 0 && device < SIM_MAX_GPUS && sim_gpus[device].used;
}

CUresult cuDeviceGetCount(int *count)
{
    if (!initialised)
        return CUDA_ERROR_NOT_INITIALIZED;
    for (*count = 0; is_device(*count); (*count)++)
        ;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    if (!initialised)
        return CUDA_ERROR_NOT_INITIALIZED;
    if (!is_device(ordinal))
        return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int len, CUdevice device)
{
    if (!initialised)
        return CUDA_ERROR_NOT_INITIALIZED;
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, (size_t)len, "Simulated GPU");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device)
{
    if (!initialised)
        return CUDA_ERROR_NOT_INITIALIZED;
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid->bytes, sim_gpus[device].uuid, 16);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device)
{
    return cuDeviceGetUuid_v2(uuid, device);
}

/* ---- what follows passes the gate ---- */

static CUresult enter(void)
{
    if (!initialised)
        return CUDA_ERROR_NOT_INITIALIZED;
    gate_enter();
    pthread_mutex_lock(&mutex);
    return CUDA_SUCCESS;
}

static CUresult enter_context(void)
{
    CUresult rc = enter();
    if (rc == CUDA_SUCCESS && (!current || !current->used)) {
        pthread_mutex_unlock(&mutex);
        gate_leave();
        rc = CUDA_ERROR_INVALID_CONTEXT;
    }
    return rc;
}

static CUresult leave(CUresult rc)
{
    pthread_mutex_unlock(&mutex);
    gate_leave();
    return rc;
}

CUresult cuCtxCreate_v2(CUcontext *ctx, unsigned int flags, CUdevice device)
{
    (void)flags;
    CUresult rc = enter();
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!is_device(device))
        return leave(CUDA_ERROR_INVALID_DEVICE);
    for (int i = 0; i < MAX_CONTEXTS; i++)
        if (!contexts[i].used) {
            contexts[i] = (struct CUctx_st){.used = true, .device = device};
            *ctx = current = &contexts[i];
            return leave(CUDA_SUCCESS);
        }
    return leave(CUDA_ERROR_OUT_OF_MEMORY);
}

static void drop(struct allocation *a)
{
    board_give(&sim_gpus[a->ctx->device], a->first, a->count);
    memset(a, 0, sizeof *a);
}

CUresult cuCtxDestroy_v2(CUcontext ctx)
{
    CUresult rc = enter();
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!ctx || !ctx->used)
        return leave(CUDA_ERROR_INVALID_CONTEXT);
    for (int i = 0; i < MAX_ALLOCATIONS; i++)
        if (allocations[i].ctx == ctx)
            drop(&allocations[i]);
    ctx->used = false;
    if (current == ctx)
        current = NULL;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxGetCurrent(CUcontext *ctx)
{
    if (!initialised)
        return CUDA_ERROR_NOT_INITIALIZED;
    *ctx = current;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext ctx)
{
    if (!initialised)
        return CUDA_ERROR_NOT_INITIALIZED;
    current = ctx;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void)
{
    CUresult rc = enter_context();
    if (rc != CUDA_SUCCESS)
        return rc;
    pthread_mutex_unlock(&mutex);
    gate_wait_launches();
    gate_leave();
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    CUresult rc = enter_context();
    if (rc != CUDA_SUCCESS)
        return rc;
    return leave(board_space(&sim_gpus[current->device], free_bytes, total_bytes));
}

/* First run of `count` unmapped device pages, or -1. */
static int64_t find_addresses(const struct sim_gpu *g, uint32_t count)
{
    for (uint32_t d = 0, run = 0; d < SIM_MAX_PAGES; d++) {
        run = g->pages[d] ? 0 : run + 1;
        if (run == count)
            return (int64_t)d - count + 1;
    }
    return -1;
}

static struct allocation *find_allocation(CUdeviceptr ptr)
{
    for (int i = 0; i < MAX_ALLOCATIONS; i++)
        if (allocations[i].ptr == ptr)
            return &allocations[i];
    return NULL;
}

CUresult cuMemAlloc_v2(CUdeviceptr *ptr, size_t bytes)
{
    if (!ptr || bytes == 0)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult rc = enter_context();
    if (rc != CUDA_SUCCESS)
        return rc;
    struct fault fault = faults_read().op[OP_ALLOC];
    if (fault.kind)
        return leave(fault.code);
    if (bytes > (size_t)SIM_MAX_PAGES * SIM_PAGE)
        return leave(CUDA_ERROR_OUT_OF_MEMORY);
    struct sim_gpu *g = &sim_gpus[current->device];
    uint32_t count = (uint32_t)((bytes + SIM_PAGE - 1) / SIM_PAGE);
    struct allocation *a = find_allocation(0);
    int64_t first = find_addresses(g, count);
    if (!a || first < 0)
        return leave(CUDA_ERROR_OUT_OF_MEMORY);
    rc = board_take(g, (uint32_t)first, count);
    if (rc != CUDA_SUCCESS)
        return leave(rc);
    *ptr = DEVICE_BASE + (uint64_t)current->device * DEVICE_SPAN + (uint64_t)first * SIM_PAGE;
    *a = (struct allocation){current, *ptr, (uint32_t)first, count};
    return leave(CUDA_SUCCESS);
}

CUresult cuMemFree_v2(CUdeviceptr ptr)
{
    CUresult rc = enter_context();
    if (rc != CUDA_SUCCESS)
        return rc;
    struct allocation *a = ptr ? find_allocation(ptr) : NULL;
    if (!a)
        return leave(CUDA_ERROR_INVALID_VALUE);
    drop(a);
    return leave(CUDA_SUCCESS);
}

static CUresult copy(CUdeviceptr device, void *host, size_t bytes, bool to_device)
{
    if (device < DEVICE_BASE || !is_device((int)((device - DEVICE_BASE) / DEVICE_SPAN)))
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t from_base = device - DEVICE_BASE;
    return board_copy(&sim_gpus[from_base / DEVICE_SPAN], from_base % DEVICE_SPAN, host, bytes,
                      to_device);
}

/* A copy waits for the launches before it, as on the default stream. */
static CUresult copy_call(CUdeviceptr device, void *host, size_t bytes, bool to_device)
{
    CUresult rc = enter_context();
    if (rc != CUDA_SUCCESS)
        return rc;
    gate_wait_launches();
    return leave(copy(device, host, bytes, to_device));
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes)
{
    return copy_call(to, (void *)(uintptr_t)from, bytes, true);
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes)
{
    return copy_call(from, to, bytes, false);
}

CUresult simgpuLaunchBusy(unsigned ms)
{
    CUresult rc = enter_context();
    if (rc != CUDA_SUCCESS)
        return rc;
    gate_launch(ms);
    return leave(CUDA_SUCCESS);
}

CUresult simgpuLaunchAdd(CUdeviceptr ptr, size_t words, uint64_t value, unsigned ms)
{
    static uint64_t chunk[SIM_PAGE / sizeof(uint64_t)];
    size_t per_chunk = sizeof chunk / sizeof chunk[0];
    CUresult rc = enter_context();
    if (rc != CUDA_SUCCESS)
        return rc;
    for (size_t done = 0; rc == CUDA_SUCCESS && done < words; done += per_chunk) {
        size_t n = words - done < per_chunk ? words - done : per_chunk;
        CUdeviceptr at = ptr + done * sizeof chunk[0];
        rc = copy(at, chunk, n * sizeof chunk[0], false);
        for (size_t i = 0; i < n; i++)
            chunk[i] += value;
        if (rc == CUDA_SUCCESS)
            rc = copy(at, chunk, n * sizeof chunk[0], true);
    }
    gate_launch(ms);
    return leave(rc);
}
