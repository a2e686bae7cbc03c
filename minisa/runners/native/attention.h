// Attention. A row by itself reads every key and value once, and none beyond its position; many rows of one sequence
// share what they read, 32 keys or values at a time. What a row sees is attended to in parts, counted from the first
// key, and both ways add the numbers of a part up in the same order: to the bit, a row's result is its own, whatever
// rows it is fed with and however many threads there are.
#pragma once
#include "vectors.h"

constexpr int kHeads = 4;   // query heads that meet each key or value while it is at hand
constexpr int kPart = 256;  // keys of a part: whole panels

struct Softmax {  // of one or more parts of a row: their weights are e^(score - max), and `sum` is the sum of these
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

// rows[h][p] = q[h] . keys[p], up to a whole vector; largest[h] of these n_keys.
template <int H, class Cache>
static void score(const float* q, Seen<Cache> keys, int n_keys, float* const* rows, float* largest) {
    int head_dim = keys.head_dim;
    f32s most[H];
    for (int h = 0; h < H; ++h) most[h] = f32s{} - INFINITY;
    for (int p = 0; p < n_keys; p += kLanes) {
        int n = std::min(kLanes, n_keys - p);
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
            f32s scores = only_first(n, sum_rows(products[h]), -INFINITY);
            most[h] = max(most[h], scores);
            store(rows[h] + p, scores);
        }
    }
    for (int h = 0; h < H; ++h) largest[h] = max_of(most[h]);
}

template <int H, class Cache>  // out[h] = sum over p of rows[h][p] * values[p]
static void weigh(const float* const* rows, Seen<Cache> values, int n_values, float* out) {
    int head_dim = values.head_dim;
    memset(out, 0, sizeof(float) * H * head_dim);
    for (int p = 0; p < n_values; p += kLanes) {  // some stay in the nearest cache while their columns are summed
        int n = std::min(kLanes, n_values - p);
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

static float largest(const float* row, int n) {  // of whole vectors
    f32s most = f32s{} - INFINITY;
    for (int p = 0; p < n; p += kLanes) most = max(most, load(row + p));
    return max_of(most);
}

static float exponentiate(float* row, int n, float most) {  // returns the sum
    f32s sums = {};
    for (int p = 0; p < n; p += kLanes) {
        f32s weights = exp(load(row + p) - most);
        store(row + p, weights);
        sums += weights;
    }
    return sum_of(sums);
}

// Many rows: 32 keys or values are widened and laid out once, as a panel that all the rows are multiplied with.

constexpr int kTogether = kLanes == 16 ? 8 : kLanes == 8 ? 3 : 1;  // rows whose sums with a panel fit the registers

// A panel of keys has a key in each lane. What `score` adds up lane by lane, and then in the pairs of sum_rows, comes
// here one after the other: the i-th sum is that of lane i with its bits reversed, and joins those that wait for it.
constexpr int kLevels = std::countr_zero((unsigned)kLanes);
static constexpr int reversed(int i) {
    int lane = 0;
    for (int bit = 0; bit < kLevels; ++bit) lane |= (i >> bit & 1) << (kLevels - 1 - bit);
    return lane;
}

template <class Cache>  // out [head_dim, kPanel], in score_panel's order: at most kPanel of n keys; zeros beyond
static void lay_out_keys(Seen<Cache> keys, int n, float* out) {
    int each = keys.head_dim / kLanes;  // numbers of a lane
    for (int i = 0; i < kPanel; i += kLanes) {
        for (int d = 0; d < each; ++d) {
            f32s square[kLanes];
            for (int j = 0; j < kLanes; ++j) square[j] = i + j < n ? load(keys[i + j] + d * kLanes) : f32s{};
            transpose(square);
            for (int j = 0; j < kLanes; ++j) store(out + (reversed(j) * each + d) * kPanel + i, square[j]);
        }
    }
}

template <class Cache>  // out [kPanel, head_dim]: at most kPanel of n values, as rows; zeros beyond
static void lay_out_values(Seen<Cache> values, int n, float* out) {
    for (int i = 0; i < kPanel; ++i)
        for (int d = 0; d < values.head_dim; d += kLanes, out += kLanes)
            store(out, i < n ? load(values[i] + d) : f32s{});
}

template <class Query, class Weights>  // weights_at(i) [kPanel] = query_of(i) . each key of a panel
static void score_panel(int n, Query query_of, const float* panel, int head_dim, Weights weights_at) {
    by_tiles<kTogether>(n, [&]<int R>(std::integral_constant<int, R>, int first) {
        const float *queries[R], *column = panel;
        f32s waiting[kLevels + 1][R][kVectors];
        for (int r = 0; r < R; ++r) queries[r] = query_of(first + r);
        for (int i = 0; i < kLanes; ++i) {
            f32s sums[R][kVectors] = {};
            for (int d = reversed(i); d < head_dim; d += kLanes, column += kPanel) {
                for (int v = 0; v < kVectors; ++v) {
                    f32s keys = load(column + v * kLanes);
                    for (int r = 0; r < R; ++r) sums[r][v] += keys * queries[r][d];
                }
            }
            int level = 0;
            for (; i >> level & 1; ++level)
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < kVectors; ++v) sums[r][v] += waiting[level][r][v];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kVectors; ++v) waiting[level][r][v] = sums[r][v];
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kVectors; ++v) store(weights_at(first + r) + v * kLanes, waiting[kLevels][r][v]);
    });
}

template <class Weights, class Sums>  // sums_of(i) [head_dim] += weights_at(i) [kPanel] of a panel's values
static void weigh_panel(int n, Weights weights_at, const float* panel, int head_dim, Sums sums_of) {
    for (int d = 0; d < head_dim; d += kPanel) {
        by_tiles<kTogether>(n, [&]<int R>(std::integral_constant<int, R>, int first) {
            const float* weights[R];
            f32s sums[R][kVectors];
            for (int r = 0; r < R; ++r) {
                weights[r] = weights_at(first + r);
                for (int v = 0; v < kVectors; ++v) sums[r][v] = load(sums_of(first + r) + d + v * kLanes);
            }
            for (int i = 0; i < kPanel; ++i) {
                for (int v = 0; v < kVectors; ++v) {
                    f32s value = load(panel + i * head_dim + d + v * kLanes);
                    for (int r = 0; r < R; ++r) sums[r][v] += value * weights[r][i];
                }
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kVectors; ++v) store(sums_of(first + r) + d + v * kLanes, sums[r][v]);
        });
    }
}
