// Loaded before the C library (LD_PRELOAD): counts the calls that touch files under a folder, and lets the n-th of them
// fail with an error number, or ends the process there.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILES = 4096 };
static char prefix[4096];
static atomic_long calls;
static long target;
static int action;  // > 0: error number; < 0: signal that the process sends itself
static char tracked[FILES];
static char last[8192];

void fault_arm(const char* folder, long n, int what) {
  snprintf(prefix, sizeof prefix, "%s", folder);
  target = n;
  action = what;
  atomic_store(&calls, 0);
}
long fault_calls(void) { return atomic_load(&calls); }
const char* fault_last(void) { return last; }

static int below(const char* path) { return prefix[0] && path && strncmp(path, prefix, strlen(prefix)) == 0; }
static int is_tracked(int fd) { return fd >= 0 && fd < FILES && tracked[fd]; }

// Whether this call is the chosen one and must fail; errno is then set.
static int fails(const char* name, const char* path) {
  if (atomic_fetch_add(&calls, 1) + 1 != target) return 0;
  snprintf(last, sizeof last, "%s %s", name, path);
  if (action < 0) {
    kill(getpid(), -action);
    return 0;
  }
  errno = action;
  return action > 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define TRACK(fd, path) \
  if ((fd) >= 0 && (fd) < FILES) tracked[fd] = below(path)

#define OPEN(name)                                                 \
  int name(const char* path, int flags, ...) {                     \
    va_list list;                                                  \
    va_start(list, flags);                                         \
    mode_t mode = va_arg(list, mode_t);                            \
    va_end(list);                                                  \
    if (below(path) && fails(#name, path)) return -1;              \
    int fd = REAL(name)(path, flags, mode);                        \
    TRACK(fd, path);                                               \
    return fd;                                                     \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                               \
  int name(int folder, const char* path, int flags, ...) {         \
    va_list list;                                                  \
    va_start(list, flags);                                         \
    mode_t mode = va_arg(list, mode_t);                            \
    va_end(list);                                                  \
    if (below(path) && fails(#name, path)) return -1;              \
    int fd = REAL(name)(folder, path, flags, mode);                \
    TRACK(fd, path);                                               \
    return fd;                                                     \
  }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
  if (fd >= 0 && fd < FILES) tracked[fd] = 0;
  return REAL(close)(fd);
}

ssize_t read(int fd, void* data, size_t size) {
  if (is_tracked(fd) && fails("read", "")) return -1;
  return REAL(read)(fd, data, size);
}

// Half of the bytes are written before the process ends or the error comes, as a disk does that fills up.
ssize_t write(int fd, const void* data, size_t size) {
  if (is_tracked(fd)) {
    if (atomic_load(&calls) + 1 == target) REAL(write)(fd, data, size / 2);
    if (fails("write", "")) return -1;
  }
  return REAL(write)(fd, data, size);
}

#define PWRITE(name, offset_type)                                            \
  ssize_t name(int fd, const void* data, size_t size, offset_type offset) {  \
    if (is_tracked(fd) && fails(#name, "")) return -1;                       \
    return REAL(name)(fd, data, size, offset);                               \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

int fsync(int fd) { return is_tracked(fd) && fails("fsync", "") ? -1 : REAL(fsync)(fd); }
int flock(int fd, int how) { return is_tracked(fd) && fails("flock", "") ? -1 : REAL(flock)(fd, how); }
int fstat(int fd, struct stat* to) { return is_tracked(fd) && fails("fstat", "") ? -1 : REAL(fstat)(fd, to); }
int fstat64(int fd, struct stat64* to) { return is_tracked(fd) && fails("fstat", "") ? -1 : REAL(fstat64)(fd, to); }

#define ON_PATH(result, bad, name, parameters, arguments) \
  result name parameters { return below(path) && fails(#name, path) ? bad : REAL(name) arguments; }
ON_PATH(int, -1, stat, (const char* path, struct stat* to), (path, to))
ON_PATH(int, -1, stat64, (const char* path, struct stat64* to), (path, to))
ON_PATH(int, -1, lstat, (const char* path, struct stat* to), (path, to))
ON_PATH(int, -1, lstat64, (const char* path, struct stat64* to), (path, to))
ON_PATH(int, -1, fstatat, (int fd, const char* path, struct stat* to, int flags), (fd, path, to, flags))
ON_PATH(int, -1, fstatat64, (int fd, const char* path, struct stat64* to, int flags), (fd, path, to, flags))
ON_PATH(int, -1, rename, (const char* path, const char* to), (path, to))
ON_PATH(int, -1, renameat, (int a, const char* path, int b, const char* to), (a, path, b, to))
ON_PATH(int, -1, unlink, (const char* path), (path))
ON_PATH(int, -1, mkdir, (const char* path, mode_t mode), (path, mode))
ON_PATH(int, -1, chmod, (const char* path, mode_t mode), (path, mode))
ON_PATH(DIR*, NULL, opendir, (const char* path), (path))
