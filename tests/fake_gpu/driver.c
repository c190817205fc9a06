// Stands for libcuda.so: what kvmp-cuda calls of it, with the host's memory for a GPU's.
//
// Bytes move when a copy is submitted, but events and host functions wait while `fake_holds_ends` is set, as behind a copy
// that goes on. One lock is round every call, as the driver's own; a registration keeps it while `fake_holds_registering`
// is set. Tests set and read the `fake_` variables, and call `fake_end` once the copies have ended.

#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, NOT_READY = 600, ILLEGAL_ADDRESS = 700, MOST = 4096 };

atomic_int fake_holds_ends, fake_holds_registering, fake_fails;
atomic_int fake_registering, fake_registers, fake_registered_mib, fake_unregisters, fake_unregistering_thread;
atomic_int fake_calls, fake_waiting, fake_queries, fake_allocations, fake_events;

typedef struct { int is_over; } Event;
typedef struct { Event *event; void (*tell)(void *); void *about; } Pending;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ended = PTHREAD_COND_INITIALIZER;
static Pending pending[MOST];
static int count;
static _Thread_local void *current;

static void enter(void) {
    fake_waiting++;
    pthread_mutex_lock(&lock);
    fake_waiting--;
    fake_calls++;
}

static int leave(int result) { pthread_mutex_unlock(&lock); return result; }
static int call(void) { enter(); return leave(OK); }

// All that was submitted has ended; host functions run as on the driver's thread, outside its lock.
void fake_end(void) {
    Pending now[MOST];
    pthread_mutex_lock(&lock);
    int n = count;
    memcpy(now, pending, n * sizeof *now);
    count = 0;
    for (int i = 0; i < n; i++) if (now[i].event) now[i].event->is_over = 1;
    pthread_cond_broadcast(&ended);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < n; i++) if (now[i].tell && !fake_fails) now[i].tell(now[i].about);
}

static int put(Pending work) {
    enter();
    if (count == MOST) abort();
    if (work.event) work.event->is_over = 0;
    pending[count++] = work;
    leave(OK);
    if (!fake_holds_ends) fake_end();
    return OK;
}

// The GPU and its context.

int cuInit(unsigned flags) { return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &lock; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
int cuCtxSetCurrent(void *context) { current = context; return OK; }
int cuCtxGetCurrent(void **context) { *context = current; return OK; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }
int cuGetErrorName(int error, const char **text) { *text = "CUDA_ERROR_FAKE"; return OK; }
int cuGetErrorString(int error, const char **text) { *text = "as the test wants it"; return OK; }

// Streams and events.

int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = &pending; return call(); }
int cuStreamDestroy_v2(void *stream) { return call(); }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return call(); }
int cuLaunchHostFunc(void *stream, void (*tell)(void *), void *about) { return put((Pending){NULL, tell, about}); }
int cuEventCreate(Event **event, unsigned flags) { fake_events++; *event = calloc(1, sizeof **event); return call(); }
int cuEventDestroy_v2(Event *event) { fake_events--; free(event); return call(); }
int cuEventRecord(Event *event, void *stream) { return put((Pending){event, NULL, NULL}); }

int cuEventQuery(Event *event) {
    enter();
    fake_queries++;
    return leave(fake_fails ? ILLEGAL_ADDRESS : event->is_over ? OK : NOT_READY);
}

int cuEventSynchronize(Event *event) {
    enter();
    while (!event->is_over && !fake_fails) pthread_cond_wait(&ended, &lock);
    return leave(fake_fails ? ILLEGAL_ADDRESS : OK);
}

int cuStreamSynchronize(void *stream) {
    enter();
    while (count && !fake_fails) pthread_cond_wait(&ended, &lock);
    return leave(OK);
}

// Memory.

int cuMemHostRegister_v2(void *host, size_t bytes, unsigned flags) {
    enter();
    fake_registering++;
    while (fake_holds_registering) usleep(1000);
    fake_registers++;
    fake_registered_mib += bytes >> 20;
    return leave(OK);
}

int cuMemHostUnregister(void *host) {
    enter();
    fake_unregisters++;
    fake_unregistering_thread = gettid();
    return leave(OK);
}

int cuMemHostGetDevicePointer_v2(void **seen, void *host, unsigned flags) { *seen = host; return call(); }
int cuMemAlloc_v2(void **memory, size_t bytes) { fake_allocations++; *memory = malloc(bytes); return call(); }
int cuMemFree_v2(void *memory) { fake_allocations--; free(memory); return call(); }
int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) { return cuMemAlloc_v2(memory, bytes); }
int cuMemFreeHost(void *memory) { return cuMemFree_v2(memory); }

// Copies.

int cuMemcpyAsync(void *to, const void *from, size_t bytes, void *stream) { memcpy(to, from, bytes); return call(); }
int cuMemcpyHtoD_v2(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); return call(); }
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) { return cuMemcpyHtoD_v2(to, from, bytes); }

#ifndef BEFORE_12_8
int cuMemcpyBatchAsync(void **to, void **from, size_t *bytes, size_t copies, void *attributes, size_t *first,
                       size_t attribute_count, size_t *failed, void *stream) {
    for (size_t i = 0; i < copies; i++) memcpy(to[i], from[i], bytes[i]);
    return call();
}
#endif

// The one kernel there is, as gather.cu has it.

typedef struct { uint64_t addr; int64_t stride; uint64_t part_offset, len; } Tile;
typedef struct { uint64_t part, block; } Pair;

int cuModuleLoadData(void **module, const void *image) { *module = &lock; return call(); }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &lock; return call(); }
int cuModuleUnload(void *module) { return call(); }

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_bytes, void *stream, void **arguments, void **extra) {
    const Tile *tiles = *(Tile **)arguments[0];
    uint32_t tile_count = *(uint32_t *)arguments[1], to_arena = *(uint32_t *)arguments[4];
    const Pair *pairs = *(Pair **)arguments[2];
    for (uint64_t item = 0; item < *(uint64_t *)arguments[3]; item++) {
        Pair pair = pairs[item / tile_count];
        Tile tile = tiles[item % tile_count];
        void *paged = (void *)(tile.addr + (int64_t)pair.block * tile.stride), *arena = (void *)(pair.part + tile.part_offset);
        memcpy(to_arena ? arena : paged, to_arena ? paged : arena, tile.len);
    }
    return call();
}
