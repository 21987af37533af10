/* simgpu-workload: the application under test. It holds tokens in CPU memory, in a file and in device
 * memory, counts, and says after every tick in one JSON line whether each token is still what it
 * was. It may be a tree of processes of several kinds; each reports in a file of its own. Holds no
 * descriptor between two ticks but those an option asks for, so that CRIU can dump it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "simcuda.h"

static struct {
    size_t bytes, cpu_bytes;
    uint64_t seed;
    unsigned tick_ms, busy_ms;
    unsigned long ticks; /* 0 = no end */
    char status[256], token_file[256], flock_file[256], fcntl_file[256], procs[256];
    bool tcp, io_uring;
    char kind[16];
} opt = {.bytes = 4 << 20, .cpu_bytes = 1 << 20, .seed = 1, .tick_ms = 100, .status = "-",
         .kind = "ctx"};

static char name[64] = "main";
static volatile sig_atomic_t stopping;

static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "simgpu-workload %s: ", name);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

/* ---- tokens ---- */

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Digest of the words less `offset`: the same for ever if each word only ever grew by it. */
static uint64_t digest(const uint64_t *words, size_t n, uint64_t offset)
{
    uint64_t d = 0;
    for (size_t i = 0; i < n; i++)
        d = (d ^ (words[i] - offset)) * 0x100000001b3ull + (d >> 47);
    return d;
}

static uint64_t *pattern(size_t n, uint64_t seed)
{
    uint64_t *words = mmap(NULL, n * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (words == MAP_FAILED)
        die("no memory for %zu words", n);
    for (size_t i = 0; i < n; i++)
        words[i] = mix(seed * 0x10001 + i);
    return words;
}

static uint64_t file_digest(void)
{
    char text[256] = "";
    int fd = open(opt.token_file, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text);
    close(fd);
    uint64_t d = 0;
    for (ssize_t i = 0; i < n; i++)
        d = mix(d ^ (unsigned char)text[i]);
    return d;
}

static void write_token_file(void)
{
    FILE *f = fopen(opt.token_file, "we");
    if (!f || fprintf(f, "token of %s, seed %lu\n", name, opt.seed) < 0 || fclose(f) != 0)
        die("%s: %s", opt.token_file, strerror(errno));
}

/* ---- CUDA, loaded when asked for ---- */

static struct {
    CUresult (*init)(unsigned);
    CUresult (*ctx_create)(CUcontext *, unsigned, CUdevice);
    CUresult (*synchronize)(void);
    CUresult (*alloc)(CUdeviceptr *, size_t);
    CUresult (*to_device)(CUdeviceptr, const void *, size_t);
    CUresult (*to_host)(void *, CUdeviceptr, size_t);
    CUresult (*add)(CUdeviceptr, size_t, uint64_t, unsigned);
} cuda;

static void *load_libcuda(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (!lib)
        die("%s", dlerror());
    return lib;
}

static void check(CUresult rc, const char *what)
{
    if (rc != CUDA_SUCCESS)
        die("%s: CUDA error %d", what, rc);
}

static void load_cuda(void)
{
    void *lib = load_libcuda();
    *(void **)&cuda.init = dlsym(lib, "cuInit");
    *(void **)&cuda.ctx_create = dlsym(lib, "cuCtxCreate_v2");
    *(void **)&cuda.synchronize = dlsym(lib, "cuCtxSynchronize");
    *(void **)&cuda.alloc = dlsym(lib, "cuMemAlloc_v2");
    *(void **)&cuda.to_device = dlsym(lib, "cuMemcpyHtoD_v2");
    *(void **)&cuda.to_host = dlsym(lib, "cuMemcpyDtoH_v2");
    *(void **)&cuda.add = dlsym(lib, "simgpuLaunchAdd");
    check(cuda.init(0), "cuInit");
}

/* ---- descriptors an option asks for ---- */

static int tcp_near = -1, tcp_far = -1;
static int lock_fd = -1, lock_probe = -1, posix_fd = -1, posix_probe = -1;

static void tcp_open(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&at, len) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&at, &len))
        die("tcp listener: %s", strerror(errno));
    tcp_near = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (tcp_near < 0 || connect(tcp_near, (struct sockaddr *)&at, len))
        die("tcp connect: %s", strerror(errno));
    tcp_far = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (tcp_far < 0)
        die("tcp accept: %s", strerror(errno));
    close(listener);
}

static bool tcp_exchange(unsigned char byte)
{
    unsigned char there = 0, back = 0;
    return send(tcp_near, &byte, 1, MSG_NOSIGNAL) == 1 && recv(tcp_far, &there, 1, 0) == 1 &&
           send(tcp_far, &there, 1, MSG_NOSIGNAL) == 1 && recv(tcp_near, &back, 1, 0) == 1 &&
           back == byte;
}

static int open_lock_file(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0)
        die("%s: %s", path, strerror(errno));
    return fd;
}

static void locks_take(void)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (*opt.flock_file) {
        lock_fd = open_lock_file(opt.flock_file);
        lock_probe = open_lock_file(opt.flock_file);
        if (flock(lock_fd, LOCK_EX | LOCK_NB))
            die("flock %s: %s", opt.flock_file, strerror(errno));
    }
    if (*opt.fcntl_file) {
        posix_fd = open_lock_file(opt.fcntl_file);
        posix_probe = open_lock_file(opt.fcntl_file);
        if (fcntl(posix_fd, F_SETLK, &whole))
            die("fcntl lock %s: %s", opt.fcntl_file, strerror(errno));
    }
}

/* Another open file of the same name must be refused. */
static bool flock_held(void)
{
    if (flock(lock_probe, LOCK_EX | LOCK_NB) == 0) {
        flock(lock_probe, LOCK_UN);
        return false;
    }
    return errno == EWOULDBLOCK;
}

static bool fcntl_held(void)
{
    struct flock probe = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(posix_probe, F_OFD_GETLK, &probe) == 0 && probe.l_type != F_UNLCK;
}

/* ---- report ---- */

static void report(const char *line, size_t n)
{
    char path[320];
    if (strcmp(opt.status, "-") == 0) {
        if (write(STDOUT_FILENO, line, n) < 0)
            stopping = 1;
        return;
    }
    snprintf(path, sizeof path, "%s%s%s", opt.status, strcmp(name, "main") ? "." : "",
             strcmp(name, "main") ? name : "");
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, line, n) != (ssize_t)n)
        die("%s: %s", path, strerror(errno));
    close(fd);
}

static void nap(unsigned ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (ms % 1000) * 1000000L};
    nanosleep(&t, NULL);
}

static const char *word(bool b)
{
    return b ? "true" : "false";
}

/* The loop of every kind of process; `device` is 0 for one that holds no device memory. The report
 * with counter 0 comes before the first launch: all is set up. */
static void count(CUdeviceptr device, uint64_t *mirror, size_t words)
{
    size_t cpu_words = opt.cpu_bytes / 8;
    uint64_t *cpu = pattern(cpu_words, opt.seed + 7);
    uint64_t cpu_token = digest(cpu, cpu_words, 0);
    uint64_t device_token = device ? digest(mirror, words, 0) : 0;
    uint64_t file_token = *opt.token_file ? file_digest() : 0;

    for (unsigned long counter = 0; !stopping && (!opt.ticks || counter <= opt.ticks); counter++) {
        uint64_t cpu_now = digest(cpu, cpu_words, 0), device_now = 0;
        uint64_t file_now = *opt.token_file ? file_digest() : 0;
        if (device) {
            if (counter)
                check(cuda.add(device, words, 1, opt.busy_ms), "launch");
            check(cuda.synchronize(), "cuCtxSynchronize");
            check(cuda.to_host(mirror, device, words * 8), "cuMemcpyDtoH");
            device_now = digest(mirror, words, counter);
        }
        bool tcp = !opt.tcp || tcp_near < 0 || tcp_exchange((unsigned char)counter);
        bool locked = lock_fd < 0 || flock_held(), posix = posix_fd < 0 || fcntl_held();
        bool ok = cpu_now == cpu_token && device_now == device_token && file_now == file_token &&
                  tcp && locked && posix;
        char line[640];
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        int n = snprintf(line, sizeof line,
                         "{\"name\": \"%s\", \"kind\": \"%s\", \"pid\": %d, \"counter\": %lu, "
                         "\"time\": %ld.%03ld, \"cpu\": \"%016lx\", \"file\": \"%016lx\", "
                         "\"device\": \"%016lx\", \"tcp\": %s, \"flock\": %s, \"fcntl\": %s, "
                         "\"ok\": %s}\n",
                         name, opt.kind, getpid(), counter, (long)now.tv_sec,
                         now.tv_nsec / 1000000, cpu_now, file_now, device_now, word(tcp),
                         word(locked), word(posix), word(ok));
        report(line, (size_t)n);
        nap(opt.tick_ms);
    }
}

/* ---- kinds of process ---- */

static void run_ctx(void)
{
    CUcontext ctx;
    CUdeviceptr device;
    size_t words = opt.bytes / 8;
    load_cuda();
    check(cuda.ctx_create(&ctx, 0, 0), "cuCtxCreate");
    check(cuda.alloc(&device, words * 8), "cuMemAlloc");
    uint64_t *mirror = pattern(words, opt.seed);
    check(cuda.to_device(device, mirror, words * 8), "cuMemcpyHtoD");
    count(device, mirror, words);
}

/* Only holds device memory, filled piece by piece: large without a copy of it in the process. Says so
 * once; what it is told to hold, nobody checks. */
static void run_hold(void)
{
    CUcontext ctx;
    CUdeviceptr device;
    size_t piece = 64 << 20;
    load_cuda();
    check(cuda.ctx_create(&ctx, 0, 0), "cuCtxCreate");
    check(cuda.alloc(&device, opt.bytes), "cuMemAlloc");
    uint64_t *bytes = pattern(piece / 8, opt.seed);
    for (size_t at = 0; at < opt.bytes; at += piece)
        check(cuda.to_device(device + at, bytes, at + piece < opt.bytes ? piece : opt.bytes - at),
              "cuMemcpyHtoD");
    report("{}\n", 3);
    while (!stopping)
        nap(opt.tick_ms);
}

/* Starts short-lived CUDA processes one after the other, each a program of its own. */
static void run_churn(char **argv)
{
    while (!stopping) {
        pid_t pid = fork();
        if (pid == 0) {
            execl("/proc/self/exe", argv[0], "--kind", "ctx", "--name", "churned", "--ticks", "3",
                  "--bytes", "65536", "--tick-ms", "20", "--status", opt.status, (char *)NULL);
            _exit(127);
        }
        if (pid < 0 || (waitpid(pid, NULL, 0) < 0 && errno != EINTR))
            die("churn: %s", strerror(errno));
    }
}

/* A CUDA process that is pid 1 of a namespace of its own (needs CAP_SYS_ADMIN). */
static void run_newpid(void)
{
    if (unshare(CLONE_NEWPID))
        die("unshare(CLONE_NEWPID): %s", strerror(errno));
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        run_ctx();
        exit(0);
    }
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
        if (stopping)
            kill(pid, SIGKILL);
}

/* A CUDA process whose child has its memory but no CUDA of its own. */
static void run_forker(void)
{
    load_cuda();
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        snprintf(name + strlen(name), 8, "c");
        count(0, NULL, 0);
        exit(0);
    }
    count(0, NULL, 0);
    kill(pid, SIGKILL);
}

static void run_kind(char **argv)
{
    if (strcmp(opt.kind, "ctx") == 0)
        run_ctx();
    else if (strcmp(opt.kind, "hold") == 0)
        run_hold();
    else if (strcmp(opt.kind, "init") == 0)
        load_cuda(), count(0, NULL, 0);
    else if (strcmp(opt.kind, "map") == 0)
        load_libcuda(), count(0, NULL, 0);
    else if (strcmp(opt.kind, "cpu") == 0)
        count(0, NULL, 0);
    else if (strcmp(opt.kind, "newpid") == 0)
        run_newpid();
    else if (strcmp(opt.kind, "fork") == 0)
        run_forker();
    else if (strcmp(opt.kind, "churn") == 0)
        run_churn(argv);
    else
        die("no such kind: %s", opt.kind);
}

/* One child per word of --procs, all forked before any CUDA call. */
static void start_children(char **argv)
{
    int index = 0;
    for (char *kind = strtok(opt.procs, ","); kind; kind = strtok(NULL, ","), index++) {
        pid_t pid = fork();
        if (pid < 0)
            die("fork: %s", strerror(errno));
        if (pid != 0)
            continue;
        snprintf(name, sizeof name, "p%d", index);
        snprintf(opt.kind, sizeof opt.kind, "%s", kind);
        opt.seed += 100 + (uint64_t)index;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        run_kind(argv);
        exit(0);
    }
}

static void on_stop(int signal)
{
    (void)signal;
    stopping = 1;
}

static void on_child(int signal)
{
    int saved = errno;
    (void)signal;
    if (strcmp(name, "main") == 0)
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
    errno = saved;
}

static void copy_word(char *to, size_t size, const char *from)
{
    if ((size_t)snprintf(to, size, "%s", from) >= size)
        die("too long: %s", from);
}

static const char usage[] =
    "simgpu-workload [--kind ctx|hold|init|map|cpu|newpid|fork|churn] [--procs KIND,KIND,...]\n"
    "  [--bytes N] [--cpu-bytes N] [--seed N] [--tick-ms N] [--busy-ms N] [--ticks N] [--name S]\n"
    "  [--status FILE|-] [--token-file FILE] [--tcp] [--flock FILE] [--fcntl-lock FILE]\n"
    "  [--io-uring]\n";

static void parse(int argc, char **argv)
{
    static const struct option options[] = {
        {"bytes", 1, 0, 'b'},   {"cpu-bytes", 1, 0, 'c'},  {"seed", 1, 0, 's'},
        {"tick-ms", 1, 0, 't'}, {"busy-ms", 1, 0, 'B'},    {"ticks", 1, 0, 'n'},
        {"status", 1, 0, 'o'},  {"token-file", 1, 0, 'f'}, {"flock", 1, 0, 'l'},
        {"procs", 1, 0, 'p'},   {"fcntl-lock", 1, 0, 'L'}, {"tcp", 0, 0, 'T'},
        {"kind", 1, 0, 'k'},    {"name", 1, 0, 'N'},       {"io-uring", 0, 0, 'U'},
        {0},
    };
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (c) {
        case 'b': opt.bytes = strtoull(optarg, NULL, 0); break;
        case 'c': opt.cpu_bytes = strtoull(optarg, NULL, 0); break;
        case 's': opt.seed = strtoull(optarg, NULL, 0); break;
        case 't': opt.tick_ms = (unsigned)strtoul(optarg, NULL, 0); break;
        case 'B': opt.busy_ms = (unsigned)strtoul(optarg, NULL, 0); break;
        case 'n': opt.ticks = strtoul(optarg, NULL, 0); break;
        case 'o': copy_word(opt.status, sizeof opt.status, optarg); break;
        case 'f': copy_word(opt.token_file, sizeof opt.token_file, optarg); break;
        case 'l': copy_word(opt.flock_file, sizeof opt.flock_file, optarg); break;
        case 'L': copy_word(opt.fcntl_file, sizeof opt.fcntl_file, optarg); break;
        case 'p': copy_word(opt.procs, sizeof opt.procs, optarg); break;
        case 'k': copy_word(opt.kind, sizeof opt.kind, optarg); break;
        case 'N': copy_word(name, sizeof name, optarg); break;
        case 'T': opt.tcp = true; break;
        case 'U': opt.io_uring = true; break;
        default: fputs(usage, stderr); exit(2);
        }
}

int main(int argc, char **argv)
{
    struct sigaction stop = {.sa_handler = on_stop}, child = {.sa_handler = on_child};

    parse(argc, argv);
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    child.sa_flags = SA_RESTART;
    if (*opt.procs)
        sigaction(SIGCHLD, &child, NULL);
    if (*opt.token_file)
        write_token_file();
    start_children(argv);
    if (opt.tcp)
        tcp_open();
    if (opt.io_uring) {
        struct io_uring_params params = {0};
        if (syscall(SYS_io_uring_setup, 4, &params) < 0)
            die("io_uring: %s", strerror(errno));
    }
    locks_take();
    run_kind(argv);
    return 0;
}
