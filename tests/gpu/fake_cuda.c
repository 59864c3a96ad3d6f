/* A stand-in for the CUDA driver on the processor, for tests: the calls that tiermem makes.
 *
 * Memory is real: reservations are PROT_NONE, handles are ranges of one memfd, a mapping is
 * MAP_FIXED. It refuses what CUDA refuses (partial or double maps, unmapping nothing). Streams are
 * real queues, run by one thread, so copies end late and a missing fence shows as wrong bytes.
 * Faults are planted with fake_fail (the nth call fails), fake_limit (bytes), fake_lack and
 * fake_slow (each map takes so long). While fake_idle is on nothing is mapped or copied, and all that is
 * queued has ended: what is left of a bench's time is the caller's own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t u64;
typedef uint32_t u32;
enum { OK = 0, INVALID = 1, OOM = 2, BAD_DEVICE = 101, BAD_CONTEXT = 201, NOT_FOUND = 500,
       NOT_READY = 600 };
enum { MOST = 65536 };
static const u64 PAGE = 2 << 20;

typedef struct op { int kind; u64 a, b, c; void *list; struct op *next; } op;
enum { COPY, SET32, RECORD, AWAIT, WRITE, HOLD, EQUAL, REACHED, GATHER, DIGEST };
typedef struct { u64 id; op *first, *last; int busy, used; } stream;
typedef struct { u64 recorded, fired; } event;
typedef struct { u64 offset, size; int held, maps; } handle;
typedef struct { u64 address, size; int handle, shown; } mapping;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t change = PTHREAD_COND_INITIALIZER;
static pthread_t thread;
static int started, fd, streams_n = 1;
static stream streams[1024] = {{.id = 1, .used = 1}};
static handle handles[MOST];
static int handles_n = 1, maps_n, retained;
static mapping maps[MOST];
static u64 offset_n, in_use, limit = 1ull << 40, ids = 1;
static char lacking[64], failing[64];
static int fail_in, fail_code, fail_ever, slow_us, denied, idle;
static void (*digest)(u64, u64, u64, u64);      /* pages, their addresses, answers, pieces a page */
static __thread u64 contexts[16];
static __thread int depth;

void fake_fail(const char *name, int nth, int code)
{
    snprintf(failing, sizeof failing, "%s", name);
    fail_in = nth;
    fail_code = code;
    fail_ever = 0;
}
void fake_fail_always(const char *name, int code) { fake_fail(name, 0, code); fail_ever = 1; }
void fake_deny(int attribute) { denied = attribute; }
void fake_slow(int us) { slow_us = us; }
void fake_idle(int on) { idle = on; }
void fake_digest(void (*fn)(u64, u64, u64, u64)) { digest = fn; }
void fake_limit(u64 bytes) { limit = bytes; }
void fake_lack(const char *name) { snprintf(lacking, sizeof lacking, "%s", name); }
u64 fake_in_use(void) { return in_use; }
int fake_mappings(void) { return maps_n; }

static int planted(const char *name)
{
    if (fail_ever && !strcmp(name, failing))
        return fail_code;
    if (fail_in && !strcmp(name, failing) && --fail_in == 0)
        return fail_code;
    return OK;
}
#define FAULT do { int code_ = planted(__func__); if (code_) return code_; } while (0)
#define CURRENT do { if (!depth || !contexts[depth - 1]) return BAD_CONTEXT; } while (0)

static int run(op *o)   /* 1 when it has ended; called without the lock */
{
    switch (o->kind) {
    case COPY: memcpy((void *)o->a, (void *)o->b, o->c); return 1;
    case SET32:
        for (u64 i = 0; i < o->c; i++) ((u32 *)o->a)[i] = (u32)o->b;
        return 1;
    case WRITE: __atomic_store_n((u64 *)o->a, o->b, __ATOMIC_SEQ_CST); return 1;
    case RECORD: __atomic_store_n(&((event *)o->a)->fired, o->b, __ATOMIC_SEQ_CST); return 1;
    case AWAIT: return __atomic_load_n(&((event *)o->a)->fired, __ATOMIC_SEQ_CST) >= o->b;
    case EQUAL: return __atomic_load_n((u64 *)o->a, __ATOMIC_SEQ_CST) == o->b;
    case REACHED: return (int64_t)(__atomic_load_n((u64 *)o->a, __ATOMIC_SEQ_CST) - o->b) >= 0;
    case DIGEST: {
        u64 *call = o->list;
        if (digest) digest(call[0], call[1], call[2], call[3]);
        return 1;
    }
    case HOLD: return __atomic_load_n((u32 *)o->a, __ATOMIC_SEQ_CST) != 0;
    default: {
        u64 n = o->a, *dst = o->list, *src = dst + n, *size = src + n;
        for (u64 i = 0; i < n; i++) memcpy((void *)dst[i], (void *)src[i], size[i]);
        return 1;
    }
    }
}

static void *work(void *arg)
{
    pthread_mutex_lock(&lock);
    for (;;) {
        int moved = 0;
        for (int i = 0; i < streams_n; i++) {
            op *o = streams[i].first;
            if (!o) continue;
            pthread_mutex_unlock(&lock);
            int ended = run(o);
            pthread_mutex_lock(&lock);
            if (!ended) continue;
            moved = 1;
            streams[i].first = o->next;
            if (!o->next) streams[i].last = NULL;
            free(o->list);
            free(o);
        }
        pthread_cond_broadcast(&change);
        if (!moved) {
            pthread_mutex_unlock(&lock);
            usleep(idle ? 100000 : 100);
            pthread_mutex_lock(&lock);
        }
    }
    return arg;
}

static int queue(u64 s, op o)
{
    CURRENT;
    if (s >= (u64)streams_n || !streams[s].used) return INVALID;
    if (idle) {
        if (o.kind == WRITE || o.kind == RECORD) run(&o);
        return OK;
    }
    op *copy = malloc(sizeof o);
    *copy = o;
    copy->next = NULL;
    pthread_mutex_lock(&lock);
    if (streams[s].last) streams[s].last->next = copy; else streams[s].first = copy;
    streams[s].last = copy;
    pthread_mutex_unlock(&lock);
    return OK;
}
int fake_hold(u64 s, u64 word) { return queue(s, (op){.kind = HOLD, .a = word}); }

int cuInit(u32 flags)
{
    FAULT;
    if (started) return OK;
    started = 1;
    fd = memfd_create("fake-cuda", 0);
    return pthread_create(&thread, NULL, work, NULL) || flags ? INVALID : OK;
}
int cuDriverGetVersion(int *v) { *v = 12080; return OK; }
int cuDeviceGetCount(int *n) { FAULT; *n = 1; return OK; }
int cuDeviceGet(int *d, int i) { *d = i; return i ? BAD_DEVICE : OK; }
int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "stand-in %d", d); return OK; }
int cuDeviceGetUuid(char *s, int d) { memset(s, 1 + d, 16); return OK; }
int cuDeviceTotalMem(u64 *n, int d) { (void)d; *n = limit; return OK; }
int cuDeviceGetAttribute(int *v, int attribute, int d)
{
    (void)d;
    *v = attribute == denied || attribute == 134 ? 0 : attribute == 102 || attribute == 103
         || attribute == 110 || attribute == 141 || attribute == 122;
    return OK;
}
int cuDevicePrimaryCtxRetain(u64 *c, int d) { FAULT; retained++; *c = 77 + d; return OK; }
int cuDevicePrimaryCtxRelease(int d) { (void)d; retained--; return OK; }
int cuCtxSetCurrent(u64 c) { depth = 1; contexts[0] = c; return OK; }
int cuCtxPushCurrent(u64 c) { contexts[depth++] = c; return OK; }
int cuCtxPopCurrent(u64 *c) { *c = contexts[--depth]; return OK; }
int cuThreadExchangeStreamCaptureMode(int *mode)
{
    static __thread int now;
    int was = now;
    now = *mode;
    *mode = was;
    return OK;
}
int cuMemGetInfo(u64 *free_, u64 *total) { CURRENT; *free_ = limit - in_use; *total = limit; return OK; }

int cuMemAddressReserve(u64 *out, u64 size, u64 alignment, u64 hint, u64 flags)
{
    FAULT;
    if (hint || flags || size % PAGE) return INVALID;
    if (alignment < PAGE) alignment = PAGE;
    char *p = mmap(NULL, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return OOM;
    *out = ((u64)p + alignment - 1) / alignment * alignment;
    return OK;
}
int cuMemAddressFree(u64 address, u64 size)
{
    FAULT;
    for (int i = 0; i < maps_n; i++)
        if (maps[i].address < address + size && address < maps[i].address + maps[i].size)
            return INVALID;
    return munmap((void *)address, size) ? INVALID : OK;
}
int cuMemGetAllocationGranularity(u64 *out, const u32 *prop, u32 option)
{
    (void)prop; (void)option;
    *out = PAGE;
    return OK;
}
int cuMemCreate(u64 *out, u64 size, const u32 *prop, u64 flags)
{
    FAULT;
    CURRENT;
    if (flags || size % PAGE || prop[0] != 1) return INVALID;
    pthread_mutex_lock(&lock);
    int full = in_use + size > limit;
    if (!full) {
        handles[handles_n] = (handle){.offset = offset_n, .size = size, .held = 1};
        offset_n += size;
        in_use += size;
        *out = handles_n++;
        full = ftruncate(fd, offset_n) ? 2 : 0;
    }
    pthread_mutex_unlock(&lock);
    return full ? OOM : OK;
}
static void drop(handle *h)
{
    if (h->held || h->maps) return;
    in_use -= h->size;
    fallocate(fd, 3, h->offset, h->size);   /* punch a hole, keep the size */
}
int cuMemRelease(u64 n)
{
    FAULT;
    if (!n || n >= (u64)handles_n || !handles[n].held) return INVALID;
    pthread_mutex_lock(&lock);
    handles[n].held = 0;
    drop(&handles[n]);
    pthread_mutex_unlock(&lock);
    return OK;
}
static int overlaps(u64 address, u64 size)
{
    for (int i = 0; i < maps_n; i++)
        if (maps[i].address < address + size && address < maps[i].address + maps[i].size) return i;
    return -1;
}
int cuMemMap(u64 address, u64 size, u64 offset, u64 n, u64 flags)
{
    FAULT;
    if (idle) return OK;
    if (slow_us) usleep(slow_us);
    if (flags || offset || address % PAGE || !n || n >= (u64)handles_n || !handles[n].held
        || size != handles[n].size)
        return INVALID;
    pthread_mutex_lock(&lock);
    int taken = overlaps(address, size) >= 0;
    if (!taken) {
        maps[maps_n++] = (mapping){address, size, (int)n, 0};
        handles[n].maps++;
    }
    pthread_mutex_unlock(&lock);
    return taken ? INVALID : OK;
}
int cuMemSetAccess(u64 address, u64 size, const u32 *desc, u64 count)
{
    FAULT;
    if (idle) return OK;
    int code = OK;
    pthread_mutex_lock(&lock);
    for (u64 at = address; at < address + size && code == OK;) {
        int i = overlaps(at, 1);
        if (i < 0 || maps[i].address != at || !count || !desc[2]) { code = INVALID; break; }
        handle *h = &handles[maps[i].handle];
        if (mmap((void *)at, h->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, h->offset)
            == MAP_FAILED)
            code = INVALID;
        at += h->size;
    }
    pthread_mutex_unlock(&lock);
    return code;
}
int cuMemUnmap(u64 address, u64 size)   /* one or more whole mappings, without a gap */
{
    FAULT;
    if (idle) return OK;
    int code = OK;
    u64 at = address;
    pthread_mutex_lock(&lock);
    while (at < address + size && code == OK) {
        int i = overlaps(at, 1);
        if (i < 0 || maps[i].address != at || at + maps[i].size > address + size) code = INVALID;
        else at += maps[i].size;
    }
    for (at = address; at < address + size && code == OK;) {
        int i = overlaps(at, 1);
        handle *h = &handles[maps[i].handle];
        mmap((void *)at, h->size, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        at += maps[i].size;
        maps[i] = maps[--maps_n];
        h->maps--;
        drop(h);
    }
    pthread_mutex_unlock(&lock);
    return code;
}
int cuMemExportToShareableHandle(int *out, u64 n, u32 type, u64 flags)
{
    (void)flags;
    *out = dup(fd);
    return n && type == 1 ? OK : INVALID;
}

int cuMemcpyAsync(u64 dst, u64 src, u64 n, u64 s)
{
    FAULT;
    return queue(s, (op){.kind = COPY, .a = dst, .b = src, .c = n});
}
int cuMemcpyBatchAsync(u64 *dst, u64 *src, u64 *size, u64 n, u32 *attributes, u64 *from, u64 kinds,
                       u64 *failed, u64 s)
{
    FAULT;
    if (!s || !n || kinds != 1 || attributes[0] != 1 || from[0]) return INVALID;
    for (u64 i = 0; i < n; i++) {
        int code = planted("entry");
        if (code) { *failed = i; return code; }
        code = queue(s, (op){.kind = COPY, .a = dst[i], .b = src[i], .c = size[i]});
        if (code) { *failed = i; return code; }
    }
    return OK;
}
int cuMemsetD32Async(u64 dst, u32 value, u64 n, u64 s)
{
    FAULT;
    return queue(s, (op){.kind = SET32, .a = dst, .b = value, .c = n});
}
int cuMemHostAlloc(u64 *out, u64 n, u32 flags)
{
    FAULT;
    *out = (u64)aligned_alloc(4096, (n + 4095) / 4096 * 4096);
    return flags & ~7u ? INVALID : OK;
}
int cuMemFreeHost(u64 p) { free((void *)p); return OK; }
int cuMemHostRegister(u64 p, u64 n, u32 flags) { FAULT; return p && n && flags == 3 ? OK : INVALID; }
int cuMemHostUnregister(u64 p) { FAULT; return p ? OK : INVALID; }

int cuEventCreate(u64 *out, u32 flags) { (void)flags; *out = (u64)calloc(1, sizeof(event)); return OK; }
int cuEventDestroy(u64 e) { return e ? OK : INVALID; }   /* a queued wait may still look at it */
int cuEventRecord(event *e, u64 s)
{
    FAULT;
    e->recorded++;
    return queue(s, (op){.kind = RECORD, .a = (u64)e, .b = e->recorded});
}
int cuEventQuery(event *e)
{
    FAULT;
    return __atomic_load_n(&e->fired, __ATOMIC_SEQ_CST) < e->recorded ? NOT_READY : OK;
}
int cuEventSynchronize(event *e)
{
    FAULT;
    while (cuEventQuery(e) == NOT_READY) usleep(50);
    return OK;
}
int cuStreamCreateWithPriority(u64 *out, u32 flags, int priority)
{
    CURRENT;
    if (flags != 1 || priority || streams_n == 1024) return INVALID;
    pthread_mutex_lock(&lock);
    streams[streams_n] = (stream){.id = ++ids, .used = 1};
    *out = streams_n++;
    pthread_mutex_unlock(&lock);
    return OK;
}
int cuStreamSynchronize(u64 s)
{
    pthread_mutex_lock(&lock);
    while (streams[s].first) pthread_cond_wait(&change, &lock);
    pthread_mutex_unlock(&lock);
    return OK;
}
int cuStreamDestroy(u64 s) { cuStreamSynchronize(s); streams[s].used = 0; return OK; }
int cuStreamWaitEvent(u64 s, event *e, u32 flags)
{
    FAULT;
    return flags ? INVALID : queue(s, (op){.kind = AWAIT, .a = (u64)e, .b = e->recorded});
}
int cuStreamWriteValue64(u64 s, u64 address, u64 value, u32 flags)
{
    FAULT;
    return flags ? INVALID : queue(s, (op){.kind = WRITE, .a = address, .b = value});
}
int cuStreamWaitValue64(u64 s, u64 address, u64 value, u32 flags)   /* CU_STREAM_WAIT_VALUE_GEQ, _EQ */
{
    FAULT;
    return flags > 1 ? INVALID : queue(s, (op){.kind = flags ? EQUAL : REACHED, .a = address, .b = value});
}
static int captured;   /* what was last said of any stream */
int cuStreamIsCapturing(u64 s, int *out) { (void)s; *out = captured = planted(__func__) != 0; return OK; }
int cuStreamGetId(u64 s, u64 *out) { *out = streams[s].id; return captured ? 900 : OK; }

int cuModuleLoadData(u64 *out, const char *ptx) { FAULT; *out = (u64)strdup(ptx); return OK; }
int cuModuleUnload(u64 m) { free((void *)m); return OK; }
int cuModuleGetFunction(u64 *out, u64 m, const char *name)
{
    *out = strcmp(name, "digest") ? 1 : 2;
    return strstr((char *)m, name) ? OK : NOT_FOUND;
}
int cuLaunchKernel(u64 f, u32 x, u32 y, u32 z, u32 bx, u32 by, u32 bz, u32 shared, u64 s,
                   void **params, void *extra)   /* the gather kernel, and the digest */
{
    FAULT;
    (void)by; (void)bz; (void)shared; (void)extra;
    if (f < 1 || f > 2 || !x || !y || z != 1 || !bx) return INVALID;
    if (f == 2) {
        u64 *call = malloc(4 * 8);
        call[0] = y;
        for (int i = 0; i < 3; i++)
            call[i + 1] = *(u64 *)params[i];
        return queue(s, (op){.kind = DIGEST, .list = call});
    }
    u64 *list = malloc(3 * 8 * (u64)y);
    for (int i = 0; i < 3; i++)
        memcpy(list + (u64)i * y, *(void **)params[i], 8 * (u64)y);
    return queue(s, (op){.kind = GATHER, .a = y, .list = list});
}
int cuGetErrorName(int code, const char **out)
{
    *out = code == INVALID ? "CUDA_ERROR_INVALID_VALUE" : code == OOM ? "CUDA_ERROR_OUT_OF_MEMORY"
           : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
    return OK;
}
int cuGetErrorString(int code, const char **out) { return cuGetErrorName(code, out); }

int cuGetProcAddress_v2(const char *name, void **out, int version, u64 flags, int *status)
{
    Dl_info info;
    (void)version; (void)flags;
    *out = NULL;
    if (strcmp(name, lacking) && dladdr((void *)run, &info)) {
        void *self = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_NOW);
        *out = self ? dlsym(self, name) : NULL;
    }
    *status = *out ? 0 : 1;
    return *out ? OK : NOT_FOUND;
}
