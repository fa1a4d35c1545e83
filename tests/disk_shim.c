/* A bad disk: loaded before libc, it counts the calls on files under one folder and lets some fail.

   REFIMG_SHIM_FOLDER    the folder, absolute and without links; unset: nothing is counted
   REFIMG_SHIM_ERRNO     28 (no space), 5 (I/O error) or 24 (too many open files); only calls that
                         can fail so are counted; 0: all are, and none fails
   REFIMG_SHIM_FAIL_AT   the number of the first call that fails, from 1
   REFIMG_SHIM_FOR       how many calls fail from there on; 0: all
   REFIMG_SHIM_KILL_AT   the number of the call before which the process gets SIGKILL
   REFIMG_SHIM_RECORD    a folder: `log` gets a line for each call, and what a power cut would leave
                         is kept: file ID has the content at its last sync, ID.names the entries of a
                         folder at its last sync

   Lines of the log: "call NUMBER NAME PATH", "new INODE ID" (a file or folder was made), "kill TIME".
   A process that is armed later calls refimg_shim_arm. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_FILES 4096
#define MOST_INODES 65536
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum { MAKES = 1, OPENS = 2, OTHER = 0 };

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char folder[PATH_MAX], record[PATH_MAX];
static size_t folder_length;
static int armed, error_number, log_file = -1;
static long fail_at, fail_for, kill_at, calls;
static char *paths[MOST_FILES];
static struct { ino_t inode; long id; } known[MOST_INODES];
static long inodes, last_id;

long refimg_shim_calls(void) { return calls; }

static void note(const char *form, ...)
{
    char line[PATH_MAX + 64];
    va_list rest;
    if (log_file < 0)
        return;
    va_start(rest, form);
    int length = vsnprintf(line, sizeof line, form, rest);
    va_end(rest);
    syscall(SYS_write, log_file, line, length < (int)sizeof line ? length : (int)sizeof line - 1);
}

void refimg_shim_arm(const char *where, const char *kept, long at, long how_many, int error,
                     long kill)
{
    pthread_mutex_lock(&lock);
    snprintf(folder, sizeof folder, "%s", where);
    snprintf(record, sizeof record, "%s", kept ? kept : "");
    folder_length = strlen(folder);
    fail_at = at, fail_for = how_many, error_number = error, kill_at = kill, calls = 0;
    if (*record) {
        char path[PATH_MAX + 8];
        snprintf(path, sizeof path, "%s/log", record);
        log_file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC,
                           0600);
        struct stat root;
        if (!stat(folder, &root)) {
            known[inodes].inode = root.st_ino, known[inodes++].id = ++last_id;
            note("new %lu %ld\n", (unsigned long)root.st_ino, last_id);
        }
    }
    armed = folder_length > 0;
    pthread_mutex_unlock(&lock);
}

static long number(const char *name)
{
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

__attribute__((constructor)) static void begin(void)
{
    const char *where = getenv("REFIMG_SHIM_FOLDER");
    if (where)
        refimg_shim_arm(where, getenv("REFIMG_SHIM_RECORD"), number("REFIMG_SHIM_FAIL_AT"),
                        number("REFIMG_SHIM_FOR"), (int)number("REFIMG_SHIM_ERRNO"),
                        number("REFIMG_SHIM_KILL_AT"));
}

/* Whether the path lies in the folder; its absolute form goes to `full`. */
static int inside(int at, const char *path, char *full)
{
    if (!armed || !path)
        return 0;
    if (*path == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        char base[PATH_MAX] = "", link[64];
        if (at == AT_FDCWD) {
            if (!getcwd(base, sizeof base))
                return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            ssize_t length = readlink(link, base, sizeof base - 1);
            base[length > 0 ? length : 0] = 0;
        }
        snprintf(full, PATH_MAX, "%.2000s/%.2000s", base, path);
    }
    return !strncmp(full, folder, folder_length)
        && (full[folder_length] == '/' || !full[folder_length]);
}

static int ours(int file)
{
    return armed && file >= 0 && file < MOST_FILES && paths[file];
}

static int may_fail(int kind, const char *name)
{
    if (!error_number || error_number == EIO)
        return 1;
    if (error_number == EMFILE)
        return kind & OPENS;
    return kind & MAKES || strstr("write pwrite writev fsync fdatasync rename link mkdir ftruncate",
                                  name) != NULL;
}

/* Counts a call; true where it must fail. The process may end here. */
static int fails(const char *name, int kind, const char *path)
{
    if (!may_fail(kind, name))
        return 0;
    calls++;
    note("call %ld %s %s\n", calls, name, path + folder_length);
    if (kill_at && calls == kill_at) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        note("kill %ld.%09ld\n", (long)now.tv_sec, now.tv_nsec);
        kill(getpid(), SIGKILL);
        for (;;)
            pause();
    }
    if (!error_number || !fail_at || calls < fail_at || (fail_for && calls >= fail_at + fail_for))
        return 0;
    errno = error_number;
    return 1;
}

/* What a power cut leaves. */

static long id_of(ino_t inode, int fresh)
{
    long at = 0;
    while (at < inodes && known[at].inode != inode)
        at++;
    if (at == inodes) {
        if (inodes == MOST_INODES)
            abort();
        known[inodes++].inode = inode;
        fresh = 1;
    }
    if (fresh) {
        known[at].id = ++last_id;
        note("new %lu %ld\n", (unsigned long)inode, last_id);
    }
    return known[at].id;
}

static void made(const char *path)
{
    struct stat status;
    if (*record && !lstat(path, &status))
        id_of(status.st_ino, 1);
}

static void keep_names(int file, long id)
{
    char line[PATH_MAX + 64];
    snprintf(line, sizeof line, "%s/%ld.names", record, id);
    int out = syscall(SYS_openat, AT_FDCWD, line, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    snprintf(line, sizeof line, "/proc/self/fd/%d", file);
    int copy = syscall(SYS_openat, AT_FDCWD, line, O_RDONLY | O_DIRECTORY, 0);
    DIR *listing = copy < 0 ? NULL : fdopendir(copy);
    for (struct dirent *one; listing && (one = readdir(listing));) {
        if (!strcmp(one->d_name, ".") || !strcmp(one->d_name, ".."))
            continue;
        int length = snprintf(line, sizeof line, "%c %ld %s\n", one->d_type == DT_DIR ? 'd' : 'f',
                              id_of(one->d_ino, 0), one->d_name);
        syscall(SYS_write, out, line, length);
    }
    if (listing)
        syscall(SYS_close, dirfd(listing));
    syscall(SYS_close, out);
}

static void keep_content(int file, long id)
{
    char path[PATH_MAX + 32], data[65536];
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    int in = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY, 0);
    snprintf(path, sizeof path, "%s/%ld", record, id);
    int out = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    for (long length; (length = syscall(SYS_read, in, data, sizeof data)) > 0;)
        syscall(SYS_write, out, data, length);
    syscall(SYS_close, in);
    syscall(SYS_close, out);
}

static void synced(int file)
{
    struct stat status;
    if (!*record || fstat(file, &status))
        return;
    long id = id_of(status.st_ino, 0);
    if (S_ISDIR(status.st_mode))
        keep_names(file, id);
    else
        keep_content(file, id);
}

/* The calls. */

#define BEGIN char full[PATH_MAX]; int here; (void)full; (void)here; \
    pthread_mutex_lock(&lock)
#define END(value) do { int kept = errno; pthread_mutex_unlock(&lock); errno = kept; \
    return value; } while (0)

static int do_open(const char *name, int at, const char *path, int flags, mode_t mode)
{
    BEGIN;
    int file = -1, makes = flags & O_CREAT, absent = 0;
    struct stat status;
    here = inside(at, path, full);
    if (here)
        absent = makes && lstat(full, &status) != 0;
    if (!here || !fails(name, OPENS | (makes ? MAKES : 0), full))
        file = syscall(SYS_openat, at, path, flags, mode);
    if (here && file >= 0 && file < MOST_FILES) {
        free(paths[file]);
        paths[file] = strdup(full);
        if (absent)
            made(full);
    }
    END(file);
}

#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); \
        mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...)
{ MODE(flags) return do_open("open", AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...)
{ MODE(flags) return do_open("open", AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int at, const char *path, int flags, ...)
{ MODE(flags) return do_open("open", at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...)
{ MODE(flags) return do_open("open", at, path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode)
{ return do_open("open", AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

DIR *opendir(const char *path)
{
    BEGIN;
    here = inside(AT_FDCWD, path, full);
    DIR *listing = here && fails("opendir", OPENS, full) ? NULL : NEXT(opendir)(path);
    END(listing);
}

int close(int file)
{
    if (!armed)
        return syscall(SYS_close, file);
    BEGIN;
    int wrong = ours(file) && fails("close", OTHER, paths[file]), kept = errno;
    if (file >= 0 && file < MOST_FILES) {
        free(paths[file]);
        paths[file] = NULL;
    }
    int value = syscall(SYS_close, file);
    if (wrong)
        value = -1, errno = kept;
    END(value);
}

#define ON_FILE(result, name, word, parameters, ...) \
    result name parameters { \
        if (!ours(file)) \
            return syscall(__VA_ARGS__); \
        BEGIN; \
        result value = ours(file) && fails(word, OTHER, paths[file]) ? -1 : syscall(__VA_ARGS__); \
        END(value); \
    }
ON_FILE(ssize_t, read, "read", (int file, void *data, size_t size), SYS_read, file, data, size)
ON_FILE(ssize_t, pread, "read", (int file, void *data, size_t size, off_t at),
        SYS_pread64, file, data, size, at)
ON_FILE(ssize_t, pread64, "read", (int file, void *data, size_t size, off64_t at),
        SYS_pread64, file, data, size, at)
ON_FILE(ssize_t, write, "write", (int file, const void *data, size_t size),
        SYS_write, file, data, size)
ON_FILE(ssize_t, pwrite, "pwrite", (int file, const void *data, size_t size, off_t at),
        SYS_pwrite64, file, data, size, at)
ON_FILE(ssize_t, pwrite64, "pwrite", (int file, const void *data, size_t size, off64_t at),
        SYS_pwrite64, file, data, size, at)
ON_FILE(ssize_t, writev, "writev", (int file, const struct iovec *parts, int count),
        SYS_writev, file, parts, count)
ON_FILE(int, ftruncate, "ftruncate", (int file, off_t size), SYS_ftruncate, file, size)
ON_FILE(int, ftruncate64, "ftruncate", (int file, off64_t size), SYS_ftruncate, file, size)

static int do_sync(const char *name, int file, long call)
{
    if (!ours(file))
        return syscall(call, file);
    BEGIN;
    int value = fails(name, OTHER, paths[file]) ? -1 : 0;
    if (!value)
        synced(file); /* nothing is sent to the real disk: it would only cost time */
    END(value);
}
int fsync(int file) { return do_sync("fsync", file, SYS_fsync); }
int fdatasync(int file) { return do_sync("fdatasync", file, SYS_fdatasync); }

#define ON_PATH(name, word, parameters, at, path, after, ...) \
    int name parameters { \
        BEGIN; \
        here = inside(at, path, full); \
        int value = here && fails(word, OTHER, full) ? -1 : (int)syscall(__VA_ARGS__); \
        if (here && !value) \
            after; \
        END(value); \
    }
ON_PATH(mkdir, "mkdir", (const char *path, mode_t mode), AT_FDCWD, path, made(full),
        SYS_mkdirat, AT_FDCWD, path, mode)
ON_PATH(mkdirat, "mkdir", (int at, const char *path, mode_t mode), at, path, made(full),
        SYS_mkdirat, at, path, mode)
ON_PATH(unlink, "unlink", (const char *path), AT_FDCWD, path, (void)0,
        SYS_unlinkat, AT_FDCWD, path, 0)
ON_PATH(rmdir, "rmdir", (const char *path), AT_FDCWD, path, (void)0,
        SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR)
ON_PATH(unlinkat, "unlink", (int at, const char *path, int flags), at, path, (void)0,
        SYS_unlinkat, at, path, flags)
ON_PATH(truncate, "ftruncate", (const char *path, off_t size), AT_FDCWD, path, (void)0,
        SYS_truncate, path, size)
ON_PATH(rename, "rename", (const char *path, const char *to), AT_FDCWD, to, (void)0,
        SYS_renameat2, AT_FDCWD, path, AT_FDCWD, to, 0)
ON_PATH(renameat, "rename", (int from, const char *path, int at, const char *to), at, to, (void)0,
        SYS_renameat2, from, path, at, to, 0)
ON_PATH(renameat2, "rename",
        (int from, const char *path, int at, const char *to, unsigned int flags), at, to, (void)0,
        SYS_renameat2, from, path, at, to, flags)
ON_PATH(link, "link", (const char *path, const char *to), AT_FDCWD, to, (void)0,
        SYS_linkat, AT_FDCWD, path, AT_FDCWD, to, 0)
ON_PATH(linkat, "link", (int from, const char *path, int at, const char *to, int flags), at, to,
        (void)0, SYS_linkat, from, path, at, to, flags)
