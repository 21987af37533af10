/* The board: device memory, which lies in files outside every process, and who owns which page of it.
 * A board is a directory gpuN with `memory` (the bytes) and `table` (header, then one owner slot
 * number per page). Ownership ends with the process: an owner holds a POSIX record lock on its slot's
 * byte of `table`, and pages whose lock is gone are free. Such a lock is not inherited by fork,
 * crosses pid namespaces, and F_GETLK tells its owner's pid. Must never use the heap or a lock that
 * a stopped application thread could hold: the driver thread runs this while the others stand still. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"

static const off_t MUTEX_BYTE = (off_t)1 << 40;

struct sim_gpu sim_gpus[SIM_MAX_GPUS];
static char board_dir[200] = SIM_BOARDS;
static char dev_prefix[200] = "/dev/nvidia";
static uint32_t table[SIM_MAX_PAGES]; /* the owner table of the board in hand */

void board_configure(const char *dir, const char *prefix)
{
    if (dir)
        snprintf(board_dir, sizeof board_dir, "%s", dir);
    if (prefix)
        snprintf(dev_prefix, sizeof dev_prefix, "%s", prefix);
}

static bool record_lock(int fd, int cmd, short type, off_t byte)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    int rc;
    do
        rc = fcntl(fd, cmd, &lock);
    while (rc < 0 && errno == EINTR);
    return rc == 0;
}

static bool owner_lives(struct sim_gpu *g, uint32_t slot)
{
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = SIM_OWNER_BYTE + slot, .l_len = 1};
    if (slot == g->slot)
        return true;
    return fcntl(g->table_fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

/* Reads the table under the board's mutex and frees the pages of the dead. */
static bool table_begin(struct sim_gpu *g)
{
    static uint8_t known[SIM_MAX_OWNERS + 1]; /* 0 not asked, 1 alive, 2 dead */
    size_t bytes = g->npages * sizeof table[0];

    if (!record_lock(g->table_fd, F_OFD_SETLKW, F_WRLCK, MUTEX_BYTE))
        return false;
    if (pread(g->table_fd, table, bytes, SIM_TABLE) != (ssize_t)bytes) {
        record_lock(g->table_fd, F_OFD_SETLK, F_UNLCK, MUTEX_BYTE);
        return false;
    }
    memset(known, 0, sizeof known);
    for (uint32_t p = 0; p < g->npages; p++) {
        uint32_t slot = table[p];
        if (slot == 0 || slot > SIM_MAX_OWNERS)
            continue;
        if (known[slot] == 0)
            known[slot] = owner_lives(g, slot) ? 1 : 2;
        if (known[slot] == 2)
            table[p] = 0;
    }
    return true;
}

static bool table_end(struct sim_gpu *g, bool write)
{
    ssize_t bytes = (ssize_t)(g->npages * sizeof table[0]);
    bool ok = !write || pwrite(g->table_fd, table, (size_t)bytes, SIM_TABLE) == bytes;
    record_lock(g->table_fd, F_OFD_SETLK, F_UNLCK, MUTEX_BYTE);
    return ok;
}

static int open_in(int board, const char *name, struct sim_header *header)
{
    char path[256];
    snprintf(path, sizeof path, "%s/gpu%d/%s", board_dir, board, name);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 && header &&
        (pread(fd, header, sizeof *header, 0) != (ssize_t)sizeof *header ||
         memcmp(header->magic, "simgpu1", 8) != 0 || header->page_size != SIM_PAGE ||
         header->npages > SIM_MAX_PAGES)) {
        close(fd);
        return -1;
    }
    return fd;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

CUresult board_attach(struct sim_gpu *g, int board)
{
    struct sim_header header;
    char dev[256];

    g->table_fd = g->memory_fd = g->dev_fd = -1;
    g->slot = 0;
    g->table_fd = open_in(board, "table", &header);
    if (g->table_fd < 0)
        return CUDA_ERROR_NO_DEVICE;
    g->memory_fd = open_in(board, "memory", NULL);
    snprintf(dev, sizeof dev, "%s%d", dev_prefix, board);
    g->dev_fd = open(dev, O_RDWR | O_CLOEXEC);
    g->npages = header.npages;
    if (g->dev_fd < 0) { /* not given to this container, or its device controller says no */
        close_fd(&g->memory_fd);
        close_fd(&g->table_fd);
        return CUDA_ERROR_NO_DEVICE;
    }
    if (g->memory_fd < 0 || !table_begin(g)) {
        close_fd(&g->dev_fd);
        close_fd(&g->memory_fd);
        close_fd(&g->table_fd);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    for (uint32_t slot = 1; slot <= SIM_MAX_OWNERS && g->slot == 0; slot++)
        if (record_lock(g->table_fd, F_SETLK, F_WRLCK, SIM_OWNER_BYTE + slot))
            g->slot = slot;
    /* The dead owner of our slot was swept by table_begin: its pages must not become ours. */
    table_end(g, true);
    if (g->slot == 0) {
        board_detach(g);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    g->board = board;
    g->used = true;
    memcpy(g->uuid, header.uuid, sizeof g->uuid);
    return CUDA_SUCCESS;
}

int board_find(const uint8_t uuid[16])
{
    for (int board = 0; board < SIM_MAX_GPUS; board++) {
        struct sim_header header;
        int fd = open_in(board, "table", &header);
        if (fd < 0)
            continue;
        close(fd);
        if (memcmp(header.uuid, uuid, 16) == 0)
            return board;
    }
    return -1;
}

void board_detach(struct sim_gpu *g)
{
    if (g->table_fd >= 0 && g->slot != 0 && table_begin(g)) {
        for (uint32_t p = 0; p < g->npages; p++)
            if (table[p] == g->slot)
                table[p] = 0;
        table_end(g, true);
    }
    g->slot = 0;
    close_fd(&g->dev_fd);
    close_fd(&g->memory_fd);
    close_fd(&g->table_fd);
}

void board_close_inherited(void)
{
    for (int i = 0; i < SIM_MAX_GPUS; i++) {
        struct sim_gpu *g = &sim_gpus[i];
        if (!g->used)
            continue; /* the device stays open in the child, as the real driver leaves it */
        close_fd(&g->memory_fd);
        close_fd(&g->table_fd);
    }
}

/* A page changes hands with nothing of its old contents: a restore that copies too little shows. */
static bool scrub(struct sim_gpu *g, uint32_t page)
{
    static char junk[SIM_PAGE];
    memset(junk, 0xdb, sizeof junk);
    return pwrite(g->memory_fd, junk, SIM_PAGE, (off_t)page * SIM_PAGE) == SIM_PAGE;
}

/* Gives board pages to the device pages [first, end), all of them or only those in use. */
static CUresult take(struct sim_gpu *g, uint32_t first, uint32_t end, bool mapped_only)
{
    uint32_t need = 0, free_pages = 0, next = 0;
    bool clean = true;

    if (!table_begin(g))
        return CUDA_ERROR_OPERATING_SYSTEM;
    for (uint32_t d = first; d < end; d++)
        need += !mapped_only || g->pages[d] != 0;
    for (uint32_t p = 0; p < g->npages; p++)
        free_pages += table[p] == 0;
    if (need > free_pages) {
        table_end(g, false);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    for (uint32_t d = first; d < end; d++) {
        if (mapped_only && g->pages[d] == 0)
            continue;
        while (table[next] != 0)
            next++;
        table[next] = g->slot;
        g->pages[d] = next + 1;
        clean = clean && scrub(g, next);
    }
    return table_end(g, true) && clean ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM;
}

CUresult board_take(struct sim_gpu *g, uint32_t first, uint32_t count)
{
    return take(g, first, first + count, false);
}

CUresult board_take_mapped(struct sim_gpu *g)
{
    return take(g, 0, SIM_MAX_PAGES, true);
}

void board_give(struct sim_gpu *g, uint32_t first, uint32_t count)
{
    if (!table_begin(g))
        return;
    for (uint32_t d = first; d < first + count; d++) {
        table[g->pages[d] - 1] = 0;
        g->pages[d] = 0;
    }
    table_end(g, true);
}

CUresult board_space(struct sim_gpu *g, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = 0;
    *total_bytes = (size_t)g->npages * SIM_PAGE;
    if (!table_begin(g))
        return CUDA_ERROR_OPERATING_SYSTEM;
    for (uint32_t p = 0; p < g->npages; p++)
        *free_bytes += table[p] == 0 ? SIM_PAGE : 0;
    table_end(g, false);
    return CUDA_SUCCESS;
}

CUresult board_copy(struct sim_gpu *g, uint64_t offset, void *buf, size_t n, bool to_device)
{
    for (size_t done = 0; done < n;) {
        uint64_t at = offset + done;
        size_t within = at % SIM_PAGE;
        size_t chunk = SIM_PAGE - within < n - done ? SIM_PAGE - within : n - done;
        uint64_t page = at / SIM_PAGE;
        char *side = (char *)buf + done;

        if (page >= SIM_MAX_PAGES || g->pages[page] == 0)
            return CUDA_ERROR_INVALID_VALUE;
        off_t where = (off_t)(g->pages[page] - 1) * SIM_PAGE + (off_t)within;
        ssize_t moved = to_device ? pwrite(g->memory_fd, side, chunk, where)
                                  : pread(g->memory_fd, side, chunk, where);
        if (moved != (ssize_t)chunk)
            return CUDA_ERROR_OPERATING_SYSTEM;
        done += chunk;
    }
    return CUDA_SUCCESS;
}
