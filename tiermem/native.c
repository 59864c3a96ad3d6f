/* Calls through function pointers, without the Python interpreter: see native.py for the contract.
 *
 * A program is an array of `call`. A queue is one or more threads that run submitted programs.
 * A clock is a count that grows; queues count their ended submissions on one. No Python.h: the
 * caller chooses by the ctypes loader (CDLL or PyDLL) whether the interpreter lock is released.
 * Last, a function that programs call: the checksum of a page.
 *
 * Locking: one mutex a clock (a queue's own clock guards the queue). No mutex is ever held while a
 * program runs, so a program may call back into Python. Memory: programs and outcomes belong to
 * the submitter, who keeps them until the outcome's state is not PENDING; nothing of them is
 * touched after that store.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ARGS = 9 };
enum { STATUS, INT, POINTER, PLAIN, WAIT };        /* kinds of call; Kind in native.py */
enum { PENDING, OK, FAILED, CANCELLED };           /* states of an outcome */
enum { FULL = 0, CLOSED = -1 };                    /* answers of submit beside a tick > 0 */

typedef struct {
    uint64_t fn, args[ARGS];
    int64_t result;
    uint32_t kind, entry;
} call;

typedef struct {
    _Atomic uint64_t state;
    uint64_t index;
    int64_t code;
} outcome;

typedef struct {
    _Atomic uint64_t *tick;                        /* own, or a word the creator gave */
    _Atomic uint64_t own;
    _Atomic uint32_t waiters;
    pthread_mutex_t mutex;
    pthread_cond_t moved;                          /* tick, an outcome, room, or `alive` changed */
} clock_;

typedef struct {
    call *calls, *undo;
    uint64_t n;
    outcome *out;
    int ended;
} entry;

struct queue;
typedef struct {
    struct queue *queue;
    pthread_t thread;
    _Atomic(clock_ *) waiting_on;
} worker;

typedef struct queue {
    clock_ clock;                                  /* first: a queue's address is its clock's */
    pthread_cond_t work;
    entry *ring;
    uint64_t depth, submitted, next;               /* tick <= next <= submitted <= tick + depth */
    uint32_t threads, started, alive, sleeping;
    int stop, lent, sticky, broken;                /* lent: a submitter runs a program itself */
    int64_t broken_code;
    _Atomic int cancel;
    const call *setup;
    uint64_t setup_n;
    outcome setup_out;
    char name[16];
    worker workers[];
} queue;

/* ---- clocks ---- */

static void clock_init(clock_ *c, _Atomic uint64_t *word)
{
    pthread_condattr_t attr;
    atomic_init(&c->own, 0);
    atomic_init(&c->waiters, 0);
    c->tick = word ? word : &c->own;
    pthread_mutex_init(&c->mutex, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&c->moved, &attr);
    pthread_condattr_destroy(&attr);
}

static void clock_destroy(clock_ *c)
{
    pthread_cond_destroy(&c->moved);
    pthread_mutex_destroy(&c->mutex);
}

static int reached(const clock_ *c, uint64_t tick, const outcome *out)
{
    return out ? atomic_load(&out->state) != PENDING : atomic_load(c->tick) >= tick;
}

static struct timespec deadline_of(int64_t timeout_ns)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += timeout_ns / 1000000000;
    at.tv_nsec += timeout_ns % 1000000000;
    if (at.tv_nsec >= 1000000000) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000;
    }
    return at;
}

/* One wait on `moved`, counted; at NULL: no limit. 0 or ETIMEDOUT. The mutex is held. */
static int nap(clock_ *c, const struct timespec *at)
{
    int rc;
    atomic_fetch_add(&c->waiters, 1);
    rc = at ? pthread_cond_timedwait(&c->moved, &c->mutex, at)
            : pthread_cond_wait(&c->moved, &c->mutex);
    atomic_fetch_sub(&c->waiters, 1);
    return rc;
}

/* Wait for `out` to end, or for the tick if out is NULL; timeout_ns < 0: no limit. 1 if reached. */
int tm_wait(clock_ *c, uint64_t tick, const outcome *out, int64_t timeout_ns)
{
    struct timespec at;
    int late = 0;
    if (reached(c, tick, out))
        return 1;
    if (timeout_ns == 0)
        return 0;
    if (timeout_ns > 0)
        at = deadline_of(timeout_ns);
    pthread_mutex_lock(&c->mutex);
    while (!reached(c, tick, out) && late != ETIMEDOUT)
        late = nap(c, timeout_ns < 0 ? NULL : &at);
    pthread_mutex_unlock(&c->mutex);
    return reached(c, tick, out);
}

clock_ *tm_clock_new(_Atomic uint64_t *word)
{
    clock_ *c = calloc(1, sizeof *c);
    if (c)
        clock_init(c, word);
    return c;
}

void tm_clock_advance(clock_ *c, uint64_t tick)
{
    pthread_mutex_lock(&c->mutex);
    if (atomic_load(c->tick) < tick)
        atomic_store(c->tick, tick);
    pthread_cond_broadcast(&c->moved);
    pthread_mutex_unlock(&c->mutex);
}

void tm_clock_free(clock_ *c)
{
    clock_destroy(c);
    free(c);
}

void tm_fence(void) { atomic_thread_fence(memory_order_acquire); }

/* ---- programs ---- */

/* A wait inside a program. 0, ECANCELED (the awaited work did not succeed, or this queue was told
 * to cancel) or EDEADLK (a wait that is not over, in a run that must not block). */
static int64_t await(const call *c, worker *w, int may_block)
{
    clock_ *k = (clock_ *)(uintptr_t)c->args[0];
    const outcome *out = (const outcome *)(uintptr_t)c->args[2];
    uint64_t tick = c->args[1];
    if (!reached(k, tick, out)) {
        if (!may_block)
            return EDEADLK;
        pthread_mutex_lock(&k->mutex);
        /* Published before `cancel` is read; tm_queue_stop sets `cancel` before it reads this and
         * takes the mutex to broadcast: one of the two sees the other. */
        if (w)
            atomic_store(&w->waiting_on, k);
        while (!reached(k, tick, out) && !(w && atomic_load(&w->queue->cancel)))
            nap(k, NULL);
        if (w)
            atomic_store(&w->waiting_on, (clock_ *)NULL);
        pthread_mutex_unlock(&k->mutex);
        if (!reached(k, tick, out))
            return ECANCELED;
    }
    return out && atomic_load(&out->state) != OK ? ECANCELED : 0;
}

typedef uint64_t (*any_fn)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                           uint64_t, uint64_t);

/* Make one call; its failure code or 0. The C calling conventions of x86-64 and aarch64 let a
 * function ignore arguments that it does not take. */
static int64_t make(call *c, worker *w, int may_block)
{
    const uint64_t *a = c->args;
    if (c->kind == WAIT)
        return await(c, w, may_block);
    errno = 0;
    c->result = (int64_t)((any_fn)(uintptr_t)c->fn)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7],
                                                    a[8]);
    switch (c->kind) {
    case STATUS:
        return (int32_t)c->result;
    case INT:
        return (int32_t)c->result == -1 ? (errno ? errno : EIO) : 0;
    case POINTER:
        return c->result == -1 ? (errno ? errno : EIO) : 0;
    default:
        return 0;
    }
}

static int run(call *calls, uint64_t n, call *undo, worker *w, int may_block, uint64_t *index,
               int64_t *code)
{
    for (uint64_t i = 0; i < n; i++) {
        *code = make(&calls[i], w, may_block);
        if (*code == 0)
            continue;
        *index = i;
        for (; undo && i > 0; i--)
            if (undo[i - 1].fn)
                make(&undo[i - 1], NULL, 0);
        return FAILED;
    }
    return OK;
}

void tm_run(call *calls, uint64_t n, call *undo, int may_block, outcome *out)
{
    int state = run(calls, n, undo, NULL, may_block, &out->index, &out->code);
    atomic_store(&out->state, (uint64_t)state);
}

/* ---- queues ---- */

/* Mark submission `seq` (from 0) as ended, move the clock over all ended in a row. Mutex held.
 * The tick moves first: whoever sees an outcome of a one-thread queue also sees its tick. */
static void end(queue *q, uint64_t seq, int state)
{
    entry *e = &q->ring[seq % q->depth];
    outcome *out = e->out;
    uint64_t tick = atomic_load(q->clock.tick);
    e->ended = 1;
    while (tick < q->next && q->ring[tick % q->depth].ended)
        q->ring[tick++ % q->depth].ended = 0;
    atomic_store(q->clock.tick, tick);
    if (state == FAILED && !q->broken) {
        q->broken = 1;
        q->broken_code = out->code;
    }
    atomic_store(&out->state, (uint64_t)state);
    if (atomic_load(&q->clock.waiters))
        pthread_cond_broadcast(&q->clock.moved);
}

/* Run submission `seq`, or end it unrun after a cancel or behind a failure of a sticky queue. */
static int carry_out(queue *q, entry *e, worker *w, int skip, int64_t skip_code)
{
    int state;
    if (skip || atomic_load(&q->cancel)) {
        e->out->index = 0;
        e->out->code = skip ? skip_code : ECANCELED;
        return CANCELLED;
    }
    state = run(e->calls, e->n, e->undo, w, w != NULL, &e->out->index, &e->out->code);
    return state == FAILED && atomic_load(&q->cancel) && e->out->code == ECANCELED ? CANCELLED
                                                                                  : state;
}

static void block_signals(void)
{
    sigset_t set;
    sigfillset(&set);
    sigdelset(&set, SIGSEGV);
    sigdelset(&set, SIGBUS);
    sigdelset(&set, SIGFPE);
    sigdelset(&set, SIGILL);
    sigdelset(&set, SIGABRT);
    pthread_sigmask(SIG_SETMASK, &set, NULL);
}

static void *work(void *arg)
{
    worker *w = arg;
    queue *q = w->queue;
    outcome out = {0};
    block_signals();
#ifdef __linux__
    pthread_setname_np(pthread_self(), q->name);
#endif
    if (q->setup_n) {
        /* Each thread runs its own copy: the array has a result column. */
        call *own = malloc(q->setup_n * sizeof *own);
        if (own) {
            memcpy(own, q->setup, q->setup_n * sizeof *own);
            tm_run(own, q->setup_n, NULL, 0, &out);
            free(own);
        } else {
            out.code = ENOMEM;
            atomic_store(&out.state, FAILED);
        }
    }
    pthread_mutex_lock(&q->clock.mutex);
    if (atomic_load(&out.state) == FAILED) {
        q->setup_out.index = out.index;
        q->setup_out.code = out.code;
        atomic_store(&q->setup_out.state, FAILED);
    }
    q->started++;
    pthread_cond_broadcast(&q->clock.moved);
    for (;;) {
        if (q->lent || q->next == q->submitted) {
            if (q->stop && !q->lent)
                break;
            q->sleeping++;
            pthread_cond_wait(&q->work, &q->clock.mutex);
            q->sleeping--;
            continue;
        }
        uint64_t seq = q->next++;
        entry e = q->ring[seq % q->depth];
        int skip = q->sticky && q->broken, state;
        int64_t code = q->broken_code;
        pthread_mutex_unlock(&q->clock.mutex);
        state = carry_out(q, &e, w, skip, code);
        pthread_mutex_lock(&q->clock.mutex);
        end(q, seq, state);
    }
    q->alive--;
    pthread_cond_broadcast(&q->clock.moved);
    pthread_mutex_unlock(&q->clock.mutex);
    return NULL;
}

void tm_queue_stop(queue *q, int cancel);
int tm_queue_join(queue *q, int64_t timeout_ns);

void tm_queue_free(queue *q)
{
    pthread_cond_destroy(&q->work);
    clock_destroy(&q->clock);
    free(q->ring);
    free(q);
}

/* Start a queue; `problem` gets the outcome of its setup. NULL with errno if no thread started. */
queue *tm_queue_new(const char *name, uint32_t threads, uint64_t depth, int sticky,
                    const call *setup, uint64_t setup_n, _Atomic uint64_t *word, outcome *problem)
{
    queue *q = calloc(1, sizeof *q + threads * sizeof(worker));
    int rc = 0;
    if (!q)
        return NULL;
    q->ring = calloc(depth, sizeof *q->ring);
    if (!q->ring) {
        free(q);
        return NULL;
    }
    clock_init(&q->clock, word);
    pthread_cond_init(&q->work, NULL);
    q->depth = depth;
    q->sticky = sticky;
    q->setup = setup;
    q->setup_n = setup_n;
    strncpy(q->name, name, sizeof q->name - 1);
    pthread_mutex_lock(&q->clock.mutex);
    for (uint32_t i = 0; i < threads && rc == 0; i++) {
        q->workers[i].queue = q;
        rc = pthread_create(&q->workers[i].thread, NULL, work, &q->workers[i]);
        if (rc == 0) {
            q->threads++;
            q->alive++;
        }
    }
    while (q->started < q->threads)
        nap(&q->clock, NULL);
    pthread_mutex_unlock(&q->clock.mutex);
    problem->index = q->setup_out.index;
    problem->code = q->setup_out.code;
    atomic_store(&problem->state, atomic_load(&q->setup_out.state));
    if (rc == 0)
        return q;
    tm_queue_stop(q, 1);
    tm_queue_join(q, -1);
    tm_queue_free(q);
    errno = rc;
    return NULL;
}

static int waits_are_over(const call *calls, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        if (calls[i].kind == WAIT
            && !reached((clock_ *)(uintptr_t)calls[i].args[0], calls[i].args[1],
                        (outcome *)(uintptr_t)calls[i].args[2]))
            return 0;
    return 1;
}

/* Queue a program: its tick, FULL or CLOSED. `here`: if nothing is queued or running and no wait
 * of it would block, the calling thread runs it before this returns (threads of the queue rest
 * meanwhile, so order is kept). */
int64_t tm_queue_submit(queue *q, call *calls, uint64_t n, call *undo, outcome *out, int here)
{
    uint64_t seq;
    entry e = {.calls = calls, .undo = undo, .n = n, .out = out};
    here = here && waits_are_over(calls, n);
    pthread_mutex_lock(&q->clock.mutex);
    uint64_t tick = atomic_load(q->clock.tick);
    if (q->stop || q->submitted - tick == q->depth) {
        int64_t answer = q->stop ? CLOSED : FULL;
        pthread_mutex_unlock(&q->clock.mutex);
        return answer;
    }
    here = here && tick == q->submitted;
    seq = q->submitted++;
    q->ring[seq % q->depth] = e;
    if (here) {
        int skip = q->sticky && q->broken, state;
        int64_t code = q->broken_code;
        q->next++;
        q->lent = 1;
        pthread_mutex_unlock(&q->clock.mutex);
        state = carry_out(q, &e, NULL, skip, code);
        pthread_mutex_lock(&q->clock.mutex);
        q->lent = 0;
        end(q, seq, state);
        if (q->sleeping && (q->stop || q->next < q->submitted))
            pthread_cond_broadcast(&q->work);
    } else if (q->sleeping && !q->lent) {
        pthread_cond_signal(&q->work);
    }
    pthread_mutex_unlock(&q->clock.mutex);
    return (int64_t)seq + 1;
}

/* Wait until an eighth of the queue is free, or it was closed; 1 if so. Not at the first free
 * place: each return costs the caller a turn at the interpreter lock. */
int tm_queue_room(queue *q, int64_t timeout_ns)
{
    struct timespec at = deadline_of(timeout_ns);
    int late = 0, full;
    pthread_mutex_lock(&q->clock.mutex);
    for (;;) {
        full = !q->stop && q->submitted - atomic_load(q->clock.tick) > q->depth - 1 - q->depth / 8;
        if (!full || late == ETIMEDOUT)
            break;
        late = nap(&q->clock, &at);
    }
    pthread_mutex_unlock(&q->clock.mutex);
    return !full;
}

/* Refuse further work. cancel: what has not begun ends as CANCELLED, a wait under way too. */
void tm_queue_stop(queue *q, int cancel)
{
    if (cancel)
        atomic_store(&q->cancel, 1);
    pthread_mutex_lock(&q->clock.mutex);
    q->stop = 1;
    pthread_cond_broadcast(&q->work);
    pthread_cond_broadcast(&q->clock.moved);
    pthread_mutex_unlock(&q->clock.mutex);
    for (uint32_t i = 0; cancel && i < q->threads; i++) {
        clock_ *k = atomic_load(&q->workers[i].waiting_on);
        if (!k)
            continue;
        pthread_mutex_lock(&k->mutex);
        pthread_cond_broadcast(&k->moved);
        pthread_mutex_unlock(&k->mutex);
    }
}

/* After stop: wait for the threads to end and join them. 0, ETIMEDOUT, or EDEADLK in one of them. */
int tm_queue_join(queue *q, int64_t timeout_ns)
{
    struct timespec at;
    int late = 0;
    for (uint32_t i = 0; i < q->threads; i++)
        if (pthread_equal(q->workers[i].thread, pthread_self()))
            return EDEADLK;
    if (timeout_ns >= 0)
        at = deadline_of(timeout_ns);
    pthread_mutex_lock(&q->clock.mutex);
    while ((q->alive || q->lent) && late != ETIMEDOUT)
        late = nap(&q->clock, timeout_ns < 0 ? NULL : &at);
    late = q->alive || q->lent;
    pthread_mutex_unlock(&q->clock.mutex);
    if (late)
        return ETIMEDOUT;
    for (uint32_t i = 0; i < q->threads; i++)
        pthread_join(q->workers[i].thread, NULL);
    q->threads = 0;
    return 0;
}

/* ---- checksums of pages: nvme/digest.py ---- */

enum { PIECE = 4096 };

/* `hash` over the hashes of the 4 KiB pieces of `bytes`; n is a multiple of 4096, not 0. */
uint64_t tm_hash_pieces(const char *bytes, uint64_t n, uint64_t (*hash)(const void *, size_t))
{
    uint64_t of[n / PIECE];
    for (uint64_t i = 0; i < n / PIECE; i++)
        of[i] = hash(bytes + i * PIECE, PIECE);
    return hash(of, sizeof of);
}
