/* What a test wants to go wrong in this process: words `op=what` in SIMGPU_FAULTS and in the files
 * control/all and control/<token>, the later of these three winning. Read afresh for every call, by
 * the driver thread: no heap, no stdio streams, no locks. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"

static char all_path[256], own_path[300], env_words[512];

void faults_configure(const char *dir, const char *token, const char *env)
{
    snprintf(all_path, sizeof all_path, "%s/control/all", dir ? dir : "/run/simgpu");
    snprintf(own_path, sizeof own_path, "%s/control/%s", dir ? dir : "/run/simgpu", token);
    snprintf(env_words, sizeof env_words, "%s", env ? env : "");
}

static void apply_word(struct faults *f, const char *word)
{
    static const char *const names[OP_COUNT] = {
        [OP_GETSTATE] = "getstate", [OP_LOCK] = "lock",     [OP_CHECKPOINT] = "checkpoint",
        [OP_RESTORE] = "restore",   [OP_UNLOCK] = "unlock", [OP_ALLOC] = "alloc",
    };
    const char *eq = strchr(word, '=');
    if (!eq)
        return;
    size_t len = (size_t)(eq - word);
    const char *value = eq + 1;
    if (len == 5 && memcmp(word, "speed", 5) == 0) {
        f->speed = strtoull(value, NULL, 10);
        return;
    }
    for (int op = 1; op < OP_COUNT; op++) {
        if (strlen(names[op]) != len || memcmp(names[op], word, len) != 0)
            continue;
        struct fault *fault = &f->op[op];
        fault->code = CUDA_ERROR_OPERATING_SYSTEM;
        if (strcmp(value, "never") == 0)
            fault->kind = FAULT_NEVER;
        else if (strcmp(value, "hang") == 0)
            fault->kind = FAULT_HANG;
        else if (strcmp(value, "failed") == 0)
            fault->kind = FAULT_FAILED;
        else if (strcmp(value, "hidden") == 0)
            fault->kind = FAULT_HIDDEN;
        else {
            fault->code = (CUresult)strtoul(value, NULL, 10);
            fault->kind = fault->code ? FAULT_CODE : FAULT_NONE;
        }
    }
}

static void apply_words(struct faults *f, char *words)
{
    char *word = words;
    while (*word) {
        size_t len = strcspn(word, ", \n");
        bool last = word[len] == '\0';
        word[len] = '\0';
        apply_word(f, word);
        word += len + (last ? 0 : 1);
    }
}

static void apply_file(struct faults *f, const char *path)
{
    char words[512];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    ssize_t n = read(fd, words, sizeof words - 1);
    close(fd);
    words[n > 0 ? n : 0] = '\0';
    apply_words(f, words);
}

struct faults faults_read(void)
{
    struct faults f;
    char words[sizeof env_words];

    memset(&f, 0, sizeof f);
    memcpy(words, env_words, sizeof words);
    apply_words(&f, words);
    apply_file(&f, all_path);
    apply_file(&f, own_path);
    return f;
}
