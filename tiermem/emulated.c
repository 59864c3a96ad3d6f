/* The window of the CPU device: groups of pages shown and hidden by mmap, each whole or not at all.
 *
 * Called from native programs (native.c) that pass one queue, so by one thread at a time; Python
 * looks at the books below only while that queue is idle. A group is first checked as a whole,
 * then mapped, then entered; if a map fails, what was mapped before it is put back. The answer is
 * 0, or index << 32 | code for the entry at `index`: a refusal (positive) or a negative errno.
 * Names and order of everything as in gpu/emulated_window.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

enum { MISPLACED = 1, OUTSIDE, TWICE, TAKEN, NOTHING_SHOWN, NO_FRAME, PARKED, CROWDED };
enum { ABSENT = -1 };

typedef struct {
    uint64_t page_bytes, most, fd, protection;     /* protection: of addresses that show nothing */
    const uint8_t *parked;                         /* [most]: frames without memory */
    int32_t *showing;                              /* [most]: how many pages show the frame */
    int64_t mappings, most_mappings;               /* of the kernel, for what is shown */
    uint64_t host_fd, host;                        /* slots of the host tier are most, most + 1, ... */
} frames;

typedef struct {
    uint64_t start, pages;
    int32_t *shown;                                /* [pages]: a frame, or ABSENT */
} range;

/* A page of the group under way holds mark(frame): below ABSENT, and its own inverse. */
static int32_t mark(int32_t frame) { return -2 - frame; }
static int32_t frame_of(int32_t shown) { return shown < ABSENT ? mark(shown) : shown; }

static int32_t *entry(const frames *f, const range *r, uint64_t address)
{
    return &r->shown[(address - r->start) / f->page_bytes];
}

/* Neighbours that show nothing, or neighbouring frames, are one mapping of the kernel's. */
static int apart(int32_t first, int32_t second)
{
    first = frame_of(first);
    second = frame_of(second);
    return first == ABSENT ? second != ABSENT : second != first + 1;
}

static int edges(const range *r, const int32_t *at)
{
    return (at > r->shown && apart(at[-1], at[0]))
         + (at + 1 < r->shown + r->pages && apart(at[0], at[1]));
}

static void set(frames *f, const range *r, int32_t *at, int32_t value)
{
    f->mappings -= edges(r, at);
    *at = value;
    f->mappings += edges(r, at);
}

/* An address before the start wraps round to far behind the end. */
static int32_t check_place(const frames *f, const range *r, uint64_t address)
{
    uint64_t offset = address - r->start;
    if (offset / f->page_bytes >= r->pages)
        return OUTSIDE;
    return offset % f->page_bytes ? MISPLACED : 0;
}

static int32_t check_show(const frames *f, const range *r, uint64_t address, int32_t frame)
{
    int32_t now, code = check_place(f, r, address);
    if (code)
        return code;
    if ((now = *entry(f, r, address)) != ABSENT)
        return now < ABSENT ? TWICE : TAKEN;
    if (frame < 0 || (uint64_t)frame >= f->most + f->host)
        return NO_FRAME;
    return (uint64_t)frame < f->most && f->parked[frame] ? PARKED : 0;
}

static int32_t check_hide(const frames *f, const range *r, uint64_t address)
{
    int32_t now, code = check_place(f, r, address);
    if (code)
        return code;
    now = *entry(f, r, address);
    return now >= 0 ? 0 : now == ABSENT ? NOTHING_SHOWN : TWICE;
}

/* Populated: what is shown can be used at once, as on a GPU: 2 MiB cost 240 us to show and 20 to
 * touch instead of 5 and 1,060; 64 KiB 20 and 0.2 instead of 7 and 40 (2-core, 2026-11). */
static int32_t map(const frames *f, uint64_t address, int32_t frame, uint64_t pages)
{
    int in_place = (uint64_t)frame >= f->most;
    uint64_t slot = in_place ? (uint64_t)frame - f->most : (uint64_t)frame;
    void *at = mmap((void *)(uintptr_t)address, pages * f->page_bytes,
                    in_place ? PROT_READ : PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED | MAP_POPULATE, (int)(in_place ? f->host_fd : f->fd),
                    (off_t)(slot * f->page_bytes));
    return at == MAP_FAILED ? -errno : 0;
}

/* One mapping too many, and the kernel refuses every mmap, this one too: then the page keeps its
 * mapping, out of reach, until it is shown anew. A hide or an undo must not fail for that. */
static int32_t unmap(const frames *f, uint64_t address, uint64_t pages)
{
    void *start = (void *)(uintptr_t)address;
    void *at = mmap(start, pages * f->page_bytes, (int)f->protection,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (at != MAP_FAILED)
        return 0;
    return errno == ENOMEM && mprotect(start, pages * f->page_bytes, PROT_NONE) == 0 ? 0 : -errno;
}

/* How many entries from the first on follow one another, and so take one call: one flush of the
 * processors' address caches instead of one a page, which other threads would feel too. */
static uint64_t run(const frames *f, const uint64_t *addresses, const int32_t *shown, uint64_t n)
{
    uint64_t k = 1;
    while (k < n && addresses[k] == addresses[0] + k * f->page_bytes
           && (!shown || (shown[k] == shown[0] + (int32_t)k && (uint64_t)shown[k] != f->most)))
        k++;
    return k;
}

static int64_t answer(uint64_t index, int32_t code)
{
    return (int64_t)(index << 32 | (uint32_t)code);
}

int64_t em_show(frames *f, range *r, const uint64_t *addresses, const int32_t *shown, uint64_t n)
{
    uint64_t checked, made = 0, k;
    int32_t code = 0;
    for (checked = 0; checked < n; checked++) {
        if ((code = check_show(f, r, addresses[checked], shown[checked])))
            break;
        set(f, r, entry(f, r, addresses[checked]), mark(shown[checked]));
    }
    if (!code && f->mappings > f->most_mappings)
        code = CROWDED;
    for (; !code && made < n; made += k) {
        k = run(f, addresses + made, shown + made, n - made);
        if ((code = map(f, addresses[made], shown[made], k)))
            break;
    }
    if (!code) {
        for (uint64_t i = 0; i < n; i++) {
            *entry(f, r, addresses[i]) = shown[i];
            if ((uint64_t)shown[i] < f->most)
                f->showing[shown[i]]++;
        }
        return 0;
    }
    int64_t said = answer(checked < n ? checked : made, code);
    while (made > 0)
        unmap(f, addresses[--made], 1);
    while (checked > 0)
        set(f, r, entry(f, r, addresses[--checked]), ABSENT);
    return said;
}

int64_t em_hide(frames *f, range *r, const uint64_t *addresses, uint64_t n)
{
    uint64_t checked, made = 0, k;
    int32_t code = 0, *at;
    for (checked = 0; checked < n; checked++) {
        if ((code = check_hide(f, r, addresses[checked])))
            break;
        at = entry(f, r, addresses[checked]);
        *at = mark(*at);
    }
    for (; !code && made < n; made += k) {
        k = run(f, addresses + made, NULL, n - made);
        if ((code = unmap(f, addresses[made], k)))
            break;
    }
    int64_t said = code ? answer(checked < n ? checked : made, code) : 0;
    for (; code && made > 0; made--)
        map(f, addresses[made - 1], mark(*entry(f, r, addresses[made - 1])), 1);
    while (checked > 0) {
        at = entry(f, r, addresses[--checked]);
        *at = mark(*at);
        if (!code) {
            if ((uint64_t)*at < f->most)
                f->showing[*at]--;
            set(f, r, at, ABSENT);
        }
    }
    return said;
}
