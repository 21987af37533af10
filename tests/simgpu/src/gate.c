/* The gate every application call passes: shut while the GPU is locked, so that a call made then waits
 * for the unlock; and the count of what is still in flight, which a lock waits for. A thread that
 * waits at the gate or stands still behind it holds nothing the driver thread needs. */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sim.h"

static _Atomic uint32_t shut, inside;
static _Atomic uint64_t busy_until; /* CLOCK_MONOTONIC ns at which the last launch is done */

void gate_enter(void)
{
    for (;;) {
        while (atomic_load(&shut))
            syscall(SYS_futex, &shut, FUTEX_WAIT, 1, NULL, NULL, 0);
        atomic_fetch_add(&inside, 1);
        if (!atomic_load(&shut))
            return;
        atomic_fetch_sub(&inside, 1);
    }
}

void gate_leave(void)
{
    atomic_fetch_sub(&inside, 1);
}

void gate_shut(void)
{
    atomic_store(&shut, 1);
}

void gate_open(void)
{
    atomic_store(&shut, 0);
    syscall(SYS_futex, &shut, FUTEX_WAKE, 1 << 30, NULL, NULL, 0);
}

bool gate_idle(void)
{
    return atomic_load(&inside) == 0 && sim_now_ns() >= atomic_load(&busy_until);
}

void gate_launch(unsigned ms)
{
    uint64_t now = sim_now_ns(), until = atomic_load(&busy_until), more;
    do
        more = (until > now ? until : now) + ms * 1000000ull;
    while (!atomic_compare_exchange_weak(&busy_until, &until, more));
}

void gate_wait_launches(void)
{
    while (sim_now_ns() < atomic_load(&busy_until))
        sim_nap_us(200);
}

/* After a lock nothing is in flight; and the clock may stand elsewhere when the process is restored. */
void gate_forget_launches(void)
{
    atomic_store(&busy_until, 0);
}
