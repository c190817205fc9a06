// Moves blocks between paged memory and the arena's registered mapping: each warp a tile of at most 4 KiB at a time.
//
// gather.ptx is made from this file, for every GPU since Turing and every driver since 11.8, by the NVRTC that torch brings:
//   .venv/bin/python -m tests.test_gather_ptx
// That test fails while it was not made anew after a change here. No CI runs it: then run tests/gpu, too.

struct Tile { unsigned long long addr; long long stride; unsigned long long part_offset; unsigned long long len; };
struct Pair { unsigned long long part; unsigned long long block; };

extern "C" __global__ void kvmp_gather(const Tile* tiles, unsigned tiles_per_block, const Pair* pairs,
                                       unsigned long long items, unsigned to_arena) {
    constexpr unsigned WARP = 32;    // threads
    constexpr unsigned VECTORS = 8;  // a thread, of 16 bytes each: 32 x 8 x 16 = 4 KiB
    const unsigned thread = threadIdx.x % WARP;
    const unsigned long long warps = (unsigned long long)gridDim.x * blockDim.x / WARP;
    unsigned long long item = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    for (; item < items; item += warps) {
        const Pair pair = pairs[item / tiles_per_block];
        const Tile tile = tiles[item % tiles_per_block];
        uint4* paged = reinterpret_cast<uint4*>(tile.addr + (long long)pair.block * tile.stride);
        uint4* arena = reinterpret_cast<uint4*>(pair.part + tile.part_offset);
        const uint4* from = to_arena ? paged : arena;
        uint4* to = to_arena ? arena : paged;
        const unsigned vectors = tile.len / sizeof(uint4);
        uint4 held[VECTORS];
#pragma unroll
        for (unsigned k = 0; k < VECTORS; ++k)
            if (thread + k * WARP < vectors) held[k] = __ldcv(from + thread + k * WARP);
#pragma unroll
        for (unsigned k = 0; k < VECTORS; ++k)
            if (thread + k * WARP < vectors) __stcs(to + thread + k * WARP, held[k]);
    }
}
