/* Preloaded: each open() and read of a file under $SLOW_DIRECTORY takes longer.

For all libraries of a process alike, whatever they call. See slow_storage.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void
wait_for(const char *path)
{
    static const char *directory;
    static struct timespec delay;
    if (directory == NULL) {
        const char *microseconds = getenv("SLOW_MICROSECONDS");
        long each = microseconds ? atol(microseconds) : 0;
        delay.tv_sec = each / 1000000;
        delay.tv_nsec = each % 1000000 * 1000;
        directory = getenv("SLOW_DIRECTORY");
        directory = directory ? directory : "";
    }
    if (*directory && path && strncmp(path, directory, strlen(directory)) == 0) {
        struct timespec left = delay;
        while (nanosleep(&left, &left) != 0) {
        }
    }
}

#define OPEN(name)                                                                                \
    int name(const char *path, int flags, ...)                                                    \
    {                                                                                             \
        static int (*next)(const char *, int, ...);                                               \
        va_list rest;                                                                             \
        va_start(rest, flags);                                                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                   \
        va_end(rest);                                                                             \
        if (next == NULL) {                                                                       \
            next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);                      \
        }                                                                                         \
        if (!(flags & O_DIRECTORY)) {                                                             \
            wait_for(path);                                                                       \
        }                                                                                         \
        return next(path, flags, mode);                                                           \
    }

OPEN(open)
OPEN(open64)

#define FOPEN(name)                                                                               \
    FILE *name(const char *path, const char *mode)                                                \
    {                                                                                             \
        static FILE *(*next)(const char *, const char *);                                         \
        if (next == NULL) {                                                                       \
            next = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, #name);              \
        }                                                                                         \
        wait_for(path);                                                                           \
        return next(path, mode);                                                                  \
    }

FOPEN(fopen)
FOPEN(fopen64)
