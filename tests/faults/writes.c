/* Preloaded into the runs of the faults' harness: sees what they write below a folder, in whatever language it is written,
 * and at the n-th of these operations does what a fault says. Built by runs.py: cc -shared -fPIC writes.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL_BEFORE, KILL_WITHIN, FAIL_ONCE, FAIL_FROM_THERE };

static char folder[PATH_MAX];
static size_t length;
static long at, operations;
static int action, error, record = -1, armed;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* From here on, operations below `path` are counted and written to the file `log`. */
void faults_arm(const char *path, long number, int what, int errnum, const char *log) {
    snprintf(folder, sizeof folder, "%s", path);
    length = strlen(folder);
    at = number, action = what, error = errnum;
    record = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    armed = 1;
}

static int below(const char *path) {
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int file_below(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

static int path_below(int dir, const char *name, char *path) {
    char base[PATH_MAX] = "";
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return below(path);
    }
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size < 0) return 0;
        base[size] = 0;
    }
    while (strncmp(name, "./", 2) == 0) name += 2;
    if (strlen(base) + strlen(name) + 2 > PATH_MAX) return 0;
    strcpy(path, base);
    strcat(strcat(path, "/"), name);
    return below(path);
}

static void die(void) {
    raise(SIGKILL);
    for (;;) pause();
}

/* Counts an operation. Returns -1 if it has to fail, and 1 if the process has to die within it. */
static int happens(const char *what, const char *path, int adds) {
    long number = __atomic_add_fetch(&operations, 1, __ATOMIC_SEQ_CST);
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%s %s\n", what, path + length);
    if (record >= 0) (void)!REAL(write)(record, line, size);
    if (action == KILL_BEFORE && number == at) die();
    if (action == KILL_WITHIN && number == at) return 1;
    if ((action == FAIL_ONCE && number == at) || (action == FAIL_FROM_THERE && number >= at && adds)) {
        errno = error;
        return -1;
    }
    return 0;
}

#define PATH_OPERATION(what, adds, in_folder, call)        \
    char path_[PATH_MAX];                                  \
    int how_ = armed && (in_folder) ? happens(what, path_, adds) : 0; \
    if (how_ < 0) return -1;                               \
    __auto_type result_ = (call);                          \
    if (how_ > 0) die();                                   \
    return result_;

#define WRITES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
#define MODE                        \
    mode_t mode = 0;                \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list words;              \
        va_start(words, flags);     \
        mode = va_arg(words, mode_t); \
        va_end(words);              \
    }

int open(const char *name, int flags, ...) {
    MODE PATH_OPERATION("open", flags & O_CREAT, (flags & WRITES) && path_below(AT_FDCWD, name, path_), REAL(open)(name, flags, mode))
}
int open64(const char *name, int flags, ...) {
    MODE PATH_OPERATION("open", flags & O_CREAT, (flags & WRITES) && path_below(AT_FDCWD, name, path_), REAL(open64)(name, flags, mode))
}
int openat(int dir, const char *name, int flags, ...) {
    MODE PATH_OPERATION("open", flags & O_CREAT, (flags & WRITES) && path_below(dir, name, path_), REAL(openat)(dir, name, flags, mode))
}
int openat64(int dir, const char *name, int flags, ...) {
    MODE PATH_OPERATION("open", flags & O_CREAT, (flags & WRITES) && path_below(dir, name, path_), REAL(openat64)(dir, name, flags, mode))
}
int rename(const char *from, const char *to) {
    PATH_OPERATION("rename", 0, path_below(AT_FDCWD, to, path_), REAL(rename)(from, to))
}
int renameat(int a, const char *from, int b, const char *to) {
    PATH_OPERATION("rename", 0, path_below(b, to, path_), REAL(renameat)(a, from, b, to))
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    PATH_OPERATION("rename", 0, path_below(b, to, path_), REAL(renameat2)(a, from, b, to, flags))
}
int mkdir(const char *name, mode_t mode) {
    PATH_OPERATION("mkdir", 1, path_below(AT_FDCWD, name, path_), REAL(mkdir)(name, mode))
}
int mkdirat(int dir, const char *name, mode_t mode) {
    PATH_OPERATION("mkdir", 1, path_below(dir, name, path_), REAL(mkdirat)(dir, name, mode))
}
int unlink(const char *name) {
    PATH_OPERATION("unlink", 0, path_below(AT_FDCWD, name, path_), REAL(unlink)(name))
}
int unlinkat(int dir, const char *name, int flags) {
    PATH_OPERATION("unlink", 0, path_below(dir, name, path_), REAL(unlinkat)(dir, name, flags))
}
int rmdir(const char *name) {
    PATH_OPERATION("rmdir", 0, path_below(AT_FDCWD, name, path_), REAL(rmdir)(name))
}
int link(const char *from, const char *to) {
    PATH_OPERATION("link", 1, path_below(AT_FDCWD, to, path_), REAL(link)(from, to))
}
int symlink(const char *from, const char *to) {
    PATH_OPERATION("symlink", 1, path_below(AT_FDCWD, to, path_), REAL(symlink)(from, to))
}
int fsync(int fd) {
    PATH_OPERATION("fsync", 0, file_below(fd, path_), REAL(fsync)(fd))
}
int fdatasync(int fd) {
    PATH_OPERATION("fsync", 0, file_below(fd, path_), REAL(fdatasync)(fd))
}
int ftruncate(int fd, off_t size) {
    PATH_OPERATION("truncate", 1, file_below(fd, path_), REAL(ftruncate)(fd, size))
}
int ftruncate64(int fd, off64_t size) {
    PATH_OPERATION("truncate", 1, file_below(fd, path_), REAL(ftruncate64)(fd, size))
}
int posix_fallocate(int fd, off_t from, off_t size) {
    char path_[PATH_MAX];
    int how = armed && file_below(fd, path_) ? happens("allocate", path_, 1) : 0;
    return how < 0 ? error : REAL(posix_fallocate)(fd, from, size);
}

/* Writes: to die within one means that half of it is there. */
#define WRITE_OPERATION(half, call)                                         \
    char path_[PATH_MAX];                                                   \
    int how_ = armed && file_below(fd, path_) ? happens("write", path_, 1) : 0; \
    if (how_ < 0) return -1;                                                \
    if (how_ > 0) {                                                         \
        (void)!(half);                                                      \
        die();                                                              \
    }                                                                       \
    return (call);

ssize_t write(int fd, const void *data, size_t size) {
    WRITE_OPERATION(REAL(write)(fd, data, size / 2), REAL(write)(fd, data, size))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t where) {
    WRITE_OPERATION(REAL(pwrite)(fd, data, size / 2, where), REAL(pwrite)(fd, data, size, where))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t where) {
    WRITE_OPERATION(REAL(pwrite64)(fd, data, size / 2, where), REAL(pwrite64)(fd, data, size, where))
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    WRITE_OPERATION(REAL(writev)(fd, parts, count / 2), REAL(writev)(fd, parts, count))
}
ssize_t sendfile(int fd, int from, off_t *where, size_t size) {
    WRITE_OPERATION(REAL(sendfile)(fd, from, where, size / 2), REAL(sendfile)(fd, from, where, size))
}
ssize_t sendfile64(int fd, int from, off64_t *where, size_t size) {
    WRITE_OPERATION(REAL(sendfile64)(fd, from, where, size / 2), REAL(sendfile64)(fd, from, where, size))
}
ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags) {
    WRITE_OPERATION(REAL(copy_file_range)(from, a, fd, b, size / 2, flags), REAL(copy_file_range)(from, a, fd, b, size, flags))
}
