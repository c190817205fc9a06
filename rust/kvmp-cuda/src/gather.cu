// Moves blocks between paged memory and the arena's registered mapping: each warp a tile of at most 4 KiB at a time.
//
// gather.ptx is made from this file, for every GPU since Turing and every driver since 11.8:
//   nvcc -ptx -arch=compute_75 -O3 gather.cu -o gather.ptx && sed -i 's/^\.version .*/.version 7.8/' gather.ptx
// Nothing compares the two files: make it anew after every change here, and run tests/gpu.

struct Tile { unsigned long long addr; long long stride; unsigned long long part_offset; unsigned long long len; };
struct Pair { unsigned long long part; unsigned long long block; };

constexpr unsigned LANES = 32;
constexpr unsigned VECTORS = 8;  // 16 bytes each: 32 lanes x 8 x 16 = 4 KiB

extern "C" __global__ void kvmp_gather(const Tile* tiles, unsigned tiles_per_block, const Pair* pairs,
                                       unsigned long long items, unsigned to_arena) {
    const unsigned lane = threadIdx.x % LANES;
    const unsigned long long warps = (unsigned long long)gridDim.x * blockDim.x / LANES;
    unsigned long long item = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
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
            if (lane + k * LANES < vectors) held[k] = __ldcv(from + lane + k * LANES);
#pragma unroll
        for (unsigned k = 0; k < VECTORS; ++k)
            if (lane + k * LANES < vectors) __stcs(to + lane + k * LANES, held[k]);
    }
}
