// A matrix times rows. Weights are read once, by 32 rows (a panel) at a time: every vector lane owns an output row, so
// a dot product never needs a sum across lanes and a panel is one sequential stream of memory.
#pragma once
#include <vector>

#include "tables.h"
#include "vectors.h"

// The rows that a matrix is about to multiply, rounded as its weights want them: to bf16, or, for integer
// weights, to eight bits with a scale for each block.
struct Activations {
    int cols = 0;
    std::vector<Rounded> rounded;  // [rows, cols]
    std::vector<int8_t> quants;    // [rows, cols]
    std::vector<float> scales;     // [rows, cols / 32]
    std::vector<int32_t> totals;   // [rows, cols / 32]: the sum of the block's quants

    void reserve(size_t size) {
        rounded.resize(size), quants.resize(size), scales.resize(size / kBlock), totals.resize(size / kBlock);
    }
    const Rounded* pair(int row, int i) const { return &rounded[(size_t)row * cols + 2 * i]; }
    uint32_t four(int row, int i) const { return load_as<uint32_t>(&quants[(size_t)row * cols + 4 * i]); }
    size_t block(int row, int i) const { return (size_t)row * (cols / kBlock) + i; }

    void set(int row, const float* values, int format) {
        if (format == kBf16) {
            for (int i = 0; i < cols; i += kLanes) store_rounded(&rounded[(size_t)row * cols + i], load(values + i));
            return;
        }
        for (int b = 0; b < cols / kBlock; ++b, values += kBlock) {
            i32s most = {};  // absolute values by their bits, of which NaN's are the largest: it stays one, in the scale
            for (int i = 0; i < kBlock; i += kLanes) most = max(most, (i32s)load(values + i) & 0x7fffffff);
            float scale = std::bit_cast<float>(max_of(most)) / 127.f, inverse = scale > 0 ? 1.f / scale : 0.f;
            i32s total = {};
            for (int i = 0; i < kBlock; i += kLanes) {
                i32s q = __builtin_convertvector(round(load(values + i) * inverse), i32s);
                i8s bytes = __builtin_convertvector(q, i8s);
                memcpy(&quants[(size_t)row * cols + b * kBlock + i], &bytes, sizeof bytes);
                total += q;
            }
            scales[block(row, b)] = scale;
            totals[block(row, b)] = 0;
            for (int i = 0; i < kLanes; ++i) totals[block(row, b)] += total[i];
        }
    }
};

// A panel's products with R rows: out[r][v] lane i += weights of its row v * kLanes + i . activations of row `row + r`.
template <int R>
using Products = f32s[R][kVectors];

struct Bf16Panel {  // [cols / 2][32 rows][2]
    static constexpr int kTile = kLanes == 16 ? 8 : 2;  // rows that meet each weight while it is in a register
    static size_t bytes(int cols) { return (size_t)cols / 2 * kColumn; }

    template <int R>
    static inline void multiply(const uint8_t* w, const Activations& x, int row, Products<R>& out) {
        for (int k = 0; k < x.cols / 2; ++k, w += kColumn) {
            for (int v = 0; v < kVectors; ++v) {
                u32s weights = load_as<u32s>(w + v * sizeof(u32s));
                for (int r = 0; r < R; ++r) out[r][v] = dot2(out[r][v], weights, x.pair(row + r, k));
            }
        }
    }
    static float at(const uint8_t* w, int, int lane, int col) {
        return std::bit_cast<float>((uint32_t)load_as<uint16_t>(w + col / 2 * kColumn + lane * 4 + col % 2 * 2) << 16);
    }
};

struct Int8Panel {  // weight = scale * (byte - 128): bytes [cols / 4][32 rows][4], then scales fp16 [cols / 32][32 rows]
    static constexpr int kTile = kLanes == 16 ? 4 : 2;
    static size_t bytes(int cols) { return (size_t)cols / 4 * kColumn + cols / kBlock * 2 * kPanel; }

    template <int R>
    static inline void multiply(const uint8_t* w, const Activations& x, int row, Products<R>& out) {
        const uint8_t* scales = w + (size_t)x.cols / 4 * kColumn;
        for (int b = 0; b < x.cols / kBlock; ++b, scales += 2 * kPanel) {
            i32s sums[R][kVectors];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kVectors; ++v) sums[r][v] = begin_int8(x.totals[x.block(row + r, b)]);
            for (int i = 0; i < kBlock / 4; ++i, w += kColumn) {
                for (int v = 0; v < kVectors; ++v) {
                    u32s bytes = load_as<u32s>(w + v * sizeof(u32s));
                    for (int r = 0; r < R; ++r) sums[r][v] = dot4_int8(sums[r][v], bytes, x.four(row + r, b * 8 + i));
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                f32s scale = load_half(scales + 2 * kLanes * v);
                for (int r = 0; r < R; ++r)
                    out[r][v] += __builtin_convertvector(sums[r][v], f32s) * (scale * x.scales[x.block(row + r, b)]);
            }
        }
    }
    static float at(const uint8_t* w, int cols, int lane, int col) {
        const uint8_t* scale = w + (size_t)cols / 4 * kColumn + col / kBlock * 2 * kPanel + lane * 2;
        return (float)load_as<_Float16>(scale) * (w[col / 4 * kColumn + lane * 4 + col % 4] - 128);
    }
};

struct Int4Panel {  // weight = scale * nibble + minimum: bytes [cols / 32][4][32 rows][4], in whose low nibbles are the
                    // block's first 16 columns; then, in fp16, [cols / 32][scale, minimum][32 rows]
    static constexpr int kTile = kLanes == 16 ? 4 : 2;
    static size_t bytes(int cols) { return (size_t)cols / 8 * kColumn + cols / kBlock * 4 * kPanel; }

    template <int R>
    static inline void multiply(const uint8_t* w, const Activations& x, int row, Products<R>& out) {
        const uint8_t* scales = w + (size_t)x.cols / 8 * kColumn;
        for (int b = 0; b < x.cols / kBlock; ++b, scales += 4 * kPanel) {
            i32s sums[R][kVectors] = {};
            for (int i = 0; i < kBlock / 8; ++i, w += kColumn) {
                for (int v = 0; v < kVectors; ++v) {
                    u32s bytes = load_as<u32s>(w + v * sizeof(u32s));
                    u32s low = bytes & 0x0f0f0f0fu, high = (bytes >> 4) & 0x0f0f0f0fu;
                    for (int r = 0; r < R; ++r) {
                        sums[r][v] = dot4_int4(sums[r][v], low, x.four(row + r, b * 8 + i));
                        sums[r][v] = dot4_int4(sums[r][v], high, x.four(row + r, b * 8 + i + 4));
                    }
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                f32s scale = load_half(scales + 2 * kLanes * v), minimum = load_half(scales + 2 * (kPanel + kLanes * v));
                for (int r = 0; r < R; ++r) {
                    f32s sum = __builtin_convertvector(sum_int4(sums[r][v]), f32s);
                    float total = (float)x.totals[x.block(row + r, b)];
                    out[r][v] += (sum * scale + minimum * total) * x.scales[x.block(row + r, b)];
                }
            }
        }
    }
    static float at(const uint8_t* w, int cols, int lane, int col) {
        const uint8_t* scale = w + (size_t)cols / 8 * kColumn + col / kBlock * 4 * kPanel + lane * 2;
        int byte = w[(col / kBlock * 4 + col % 16 / 4) * kColumn + lane * 4 + col % 4];
        int nibble = col % kBlock < 16 ? byte & 15 : byte >> 4;
        return (float)load_as<_Float16>(scale) * nibble + (float)load_as<_Float16>(scale + 2 * kPanel);
    }
};

template <class Call>
static void by_format(int format, Call call) {
    switch (format) {
        case kBf16: return call(Bf16Panel{});
        case kInt8: return call(Int8Panel{});
        case kInt4: return call(Int4Panel{});
    }
}

struct Share {  // which part of the work is this thread's
    int thread, n_threads;
    int begin(int n) const { return (int)((int64_t)n * thread / n_threads); }
    int end(int n) const { return (int)((int64_t)n * (thread + 1) / n_threads); }
};

// emit(row, panel, products) gets every row's products with each of this thread's panels.
template <class Emit>
static void matmul(const Matrix& w, const Activations& x, int n_rows, Share share, Emit emit) {
    by_format(w.format, [&]<class Panel>(Panel) {
        int n_panels = (w.rows + kPanel - 1) / kPanel;
        for (int panel = share.begin(n_panels); panel < share.end(n_panels); ++panel) {
            by_tiles<Panel::kTile>(n_rows, [&]<int R>(std::integral_constant<int, R>, int row) {
                Products<R> out = {};
                Panel::template multiply<R>(w.data + panel * Panel::bytes(w.cols), x, row, out);
                for (int r = 0; r < R; ++r) emit(row + r, panel, out[r]);
            });
        }
    });
}

static void read_row(const Matrix& w, int row, float* out) {  // a token's embedding, often out of the head's panels
    by_format(w.format, [&]<class Panel>(Panel) {
        const uint8_t* panel = w.data + row / kPanel * Panel::bytes(w.cols);
        for (int i = 0; i < w.cols; ++i) out[i] = Panel::at(panel, w.cols, row % kPanel, i);
    });
}
