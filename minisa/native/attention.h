// Attention. A row by itself reads every key and value once, and none beyond its position; many rows of one sequence
// share what they read, 32 keys or values at a time.
#pragma once
#include "vectors.h"

constexpr int kHeads = 4;  // query heads that meet each key or value while it is at hand

struct Softmax {  // of one part of a row: the row holds e^(score - max), and `sum` is its sum
    float max, sum;
};

template <class Cache>
struct Seen {  // the keys or values of one head that a row sees, counted from the first; they may go round a ring
    const Cache* slots;
    int first, ring, head_dim;
    const Cache* operator[](int i) const {
        int slot = first + i;
        return slots + (size_t)(slot < ring ? slot : slot - ring) * head_dim;
    }
};

// rows[h][p] = scale * q[h] . keys[p], up to a whole vector; and the largest of them.
template <int H, class Cache>
static void score(const float* q, Seen<Cache> keys, int begin, int end, float scale, float* const* rows,
                  Softmax* softmax) {
    int head_dim = keys.head_dim;
    f32s most[H];
    for (int h = 0; h < H; ++h) most[h] = f32s{} - INFINITY;
    for (int p = begin; p < end; p += kLanes) {
        int n = std::min(kLanes, end - p);
        f32s products[H][kLanes];
        for (int i = 0; i < kLanes; i += 4) {  // four keys at a time, so that queries are loaded less often
            f32s sums[H][4] = {};
            const Cache* key[4];
            for (int j = 0; j < 4; ++j) key[j] = keys[p + std::min(i + j, n - 1)];
            for (int d = 0; d < head_dim; d += kLanes) {
                for (int h = 0; h < H; ++h) {
                    f32s part = load(q + h * head_dim + d);
                    for (int j = 0; j < 4; ++j) sums[h][j] += part * load(key[j] + d);
                }
            }
            for (int h = 0; h < H; ++h)
                for (int j = 0; j < 4; ++j) products[h][i + j] = sums[h][j];
        }
        for (int h = 0; h < H; ++h) {
            f32s scores = only_first(n, sum_rows(products[h]) * scale, -INFINITY);
            most[h] = max(most[h], scores);
            store(rows[h] + p, scores);
        }
    }
    for (int h = 0; h < H; ++h) softmax[h].max = max_of(most[h]);
}

template <int H, class Cache>  // out[h] = sum over p of rows[h][p] * values[p]
static void weigh(const float* const* rows, Seen<Cache> values, int begin, int end, float* out) {
    int head_dim = values.head_dim;
    memset(out, 0, sizeof(float) * H * head_dim);
    for (int p = begin; p < end; p += kLanes) {  // some values stay in the nearest cache while their columns are summed
        int n = std::min(kLanes, end - p);
        for (int d = 0; d < head_dim; d += 2 * kLanes) {
            f32s sums[H][2];
            for (int h = 0; h < H; ++h)
                for (int v = 0; v < 2; ++v) sums[h][v] = load(out + h * head_dim + d + v * kLanes);
            for (int i = 0; i < n; ++i) {
                const Cache* value = values[p + i] + d;
                f32s low = load(value), high = load(value + kLanes);
                for (int h = 0; h < H; ++h) {
                    sums[h][0] += low * rows[h][p + i];
                    sums[h][1] += high * rows[h][p + i];
                }
            }
            for (int h = 0; h < H; ++h)
                for (int v = 0; v < 2; ++v) store(out + h * head_dim + d + v * kLanes, sums[h][v]);
        }
    }
}

// call(integral_constant<H>, first head) for the heads of a group, four or fewer at a time.
template <class Call>
static void by_heads(int group, Call call) {
    for (int head = 0; head < group; head += kHeads) {
        switch (std::min(kHeads, group - head)) {
            case 1: call(std::integral_constant<int, 1>{}, head); break;
            case 2: call(std::integral_constant<int, 2>{}, head); break;
            case 3: call(std::integral_constant<int, 3>{}, head); break;
            case 4: call(std::integral_constant<int, 4>{}, head); break;
        }
    }
}

static float largest(const float* row, int end) {  // of whole vectors
    f32s most = f32s{} - INFINITY;
    for (int p = 0; p < end; p += kLanes) most = max(most, load(row + p));
    return max_of(most);
}

static float exponentiate(float* row, int begin, int end, float most) {  // returns the sum
    f32s sums = {};
    for (int p = begin; p < end; p += kLanes) {
        f32s weights = exp(load(row + p) - most);
        store(row + p, weights);
        sums += weights;
    }
    return sum_of(sums);
}

// Many rows: 32 keys or values are widened and laid out once, as a panel that all the rows are multiplied with.

constexpr int kTogether = kLanes == 16 ? 8 : kLanes == 8 ? 3 : 1;  // rows whose sums with a panel fit the registers

template <class Cache>  // out [head_dim, kPanel]: the keys from `begin` on, as columns; zeros for those from `end` on
static void lay_out_keys(Seen<Cache> keys, int begin, int end, float* out) {
    for (int i = 0; i < kPanel; i += kLanes) {
        for (int d = 0; d < keys.head_dim; d += kLanes) {
            f32s square[kLanes];
            for (int j = 0; j < kLanes; ++j) square[j] = begin + i + j < end ? load(keys[begin + i + j] + d) : f32s{};
            transpose(square);
            for (int j = 0; j < kLanes; ++j) store(out + (d + j) * kPanel + i, square[j]);
        }
    }
}

template <class Cache>  // out [kPanel, head_dim]: the values from `begin` on, as rows; zeros for those from `end` on
static void lay_out_values(Seen<Cache> values, int begin, int end, float* out) {
    for (int i = 0; i < kPanel; ++i)
        for (int d = 0; d < values.head_dim; d += kLanes, out += kLanes)
            store(out, begin + i < end ? load(values[begin + i] + d) : f32s{});
}

// emit(i, products) gets the products [kPanel] of each of n rows [n_cols] with a panel [n_cols, kPanel] of some stride.
template <class Row, class Emit>
static void by_panel(int n, Row row_of, const float* panel, int n_cols, int stride, Emit emit) {
    auto tile = [&]<int R>(std::integral_constant<int, R>, int first) {
        const float* rows[R];
        f32s sums[R][kVectors] = {};
        for (int r = 0; r < R; ++r) rows[r] = row_of(first + r);
        for (int k = 0; k < n_cols; ++k) {
            for (int v = 0; v < kVectors; ++v) {
                f32s column = load(panel + k * stride + v * kLanes);
                for (int r = 0; r < R; ++r) sums[r][v] += column * rows[r][k];
            }
        }
        for (int r = 0; r < R; ++r) emit(first + r, sums[r]);
    };
    int i = 0;
    for (; i + kTogether <= n; i += kTogether) tile(std::integral_constant<int, kTogether>{}, i);
    for (; i < n; ++i) tile(std::integral_constant<int, 1>{}, i);
}
