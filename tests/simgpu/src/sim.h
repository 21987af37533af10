/* What the parts of the simulated driver share: the board (device memory), the mailbox through which
 * other processes speak to the driver thread, and the faults a test has asked for. Nothing here may
 * be needed by a program that uses the library: that is simcuda.h. */
#ifndef SIM_H
#define SIM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "simcuda.h"

/* ---- board.c: device memory in files outside the process ---- */

enum { SIM_MAX_GPUS = 8, SIM_PAGE = 65536, SIM_MAX_PAGES = 1 << 18 };

/* The table on disk: this header, at SIM_TABLE the owner slots. Slot N's owner holds a record lock
 * on byte SIM_OWNER_BYTE + N. */
enum { SIM_TABLE = 4096, SIM_MAX_OWNERS = 4096 };
#define SIM_OWNER_BYTE ((off_t)1 << 41)
#define SIM_BOARDS "/run/simgpu"

struct sim_header {
    char magic[8];
    uint32_t page_size;
    uint32_t npages;
    uint8_t uuid[16];
};

/* One GPU as this process sees it. Device addresses are stable; the board and the pages behind
 * them change with every restore, as behind a GPU's MMU. */
struct sim_gpu {
    bool used;                        /* the process found this GPU at cuInit */
    int board;                        /* index of the board now behind it */
    uint8_t uuid[16];                 /* of that board, kept while detached */
    int table_fd, memory_fd, dev_fd;  /* open only while attached, else -1 */
    uint32_t slot;                    /* our owner slot on the board */
    uint32_t npages;                  /* capacity of the board */
    uint32_t pages[SIM_MAX_PAGES];    /* device page -> board page + 1; 0 = not mapped */
};

extern struct sim_gpu sim_gpus[SIM_MAX_GPUS];

void board_configure(const char *dir, const char *dev_prefix);
/* All return CUDA_SUCCESS or the error to hand to the caller. */
CUresult board_attach(struct sim_gpu *g, int board);
/* The board with this uuid, or -1. Only while detached from all: closing a table drops its locks. */
int board_find(const uint8_t uuid[16]);
void board_detach(struct sim_gpu *g); /* gives back every page, the owner slot and the device */
void board_close_inherited(void);     /* in a forked child: drop the parent's descriptors */
CUresult board_take(struct sim_gpu *g, uint32_t first, uint32_t count);
void board_give(struct sim_gpu *g, uint32_t first, uint32_t count);
/* Back every mapped device page with new board pages, contents undefined. */
CUresult board_take_mapped(struct sim_gpu *g);
CUresult board_space(struct sim_gpu *g, size_t *free_bytes, size_t *total_bytes);
/* `to_device` copies buf -> device, else device -> buf; the range may cross pages. */
CUresult board_copy(struct sim_gpu *g, uint64_t offset, void *buf, size_t n, bool to_device);

/* ---- faults.c: what the test wants to go wrong ---- */

enum sim_op { OP_GETSTATE = 1, OP_LOCK, OP_CHECKPOINT, OP_RESTORE, OP_UNLOCK, OP_ALLOC, OP_COUNT };

enum fault_kind { FAULT_NONE = 0, FAULT_CODE, FAULT_NEVER, FAULT_HANG, FAULT_FAILED, FAULT_HIDDEN };

struct fault {
    enum fault_kind kind;
    CUresult code;
};

struct faults {
    struct fault op[OP_COUNT];
    uint64_t speed; /* bytes per second of Checkpoint and Restore; 0 = no limit */
};

void faults_configure(const char *dir, const char *token, const char *env);
/* Reads the control files now; takes no lock and no heap. */
struct faults faults_read(void);

/* ---- mailbox: how one process speaks about another ---- */

enum { MAIL_SLOTS = 64, MAIL_PAIRS = 8 };
#define MAIL_MAGIC "simgpu mailbox1"

struct mail_call {
    uint32_t op;
    uint32_t timeout_ms;
    uint32_t npairs;
    uint32_t pad;
    CUcheckpointGpuPair pairs[MAIL_PAIRS];
    uint64_t ticket; /* written last: the call is complete */
};

struct mail_answer {
    uint32_t result;
    uint32_t state;
    uint64_t ticket; /* written last */
};

/* A caller takes a ticket by writing it to a free queue slot, is called when `serving` shows it,
 * writes its call and waits for the answer in its slot. The driver thread alone decides who is
 * served, so writers need no atomic compare-and-swap across processes, and a caller that died
 * while it waited is dropped unheard. */
struct mailbox {
    char magic[16];
    int32_t pid;        /* own pid in the innermost namespace; 0 = CUDA not initialised */
    int32_t driver_tid; /* of the driver thread, same namespace */
    uint32_t state;     /* CUprocessState */
    char token[36];     /* names the process in the control directory */
    uint64_t queue[MAIL_SLOTS];
    uint64_t serving;
    struct mail_call call;
    struct mail_answer answers[MAIL_SLOTS];
};

extern volatile struct mailbox sim_mailbox;

/* ---- gate.c: application calls stop here while the GPU is locked ---- */

void gate_enter(void);
void gate_leave(void);
void gate_shut(void);
void gate_open(void);
bool gate_idle(void); /* no call inside and no launch in flight */
void gate_launch(unsigned ms);
void gate_wait_launches(void);
void gate_forget_launches(void);

/* ---- driver.c ---- */

CUresult driver_start(void);
uint64_t sim_now_ns(void);
void sim_nap_us(unsigned us);

#endif
