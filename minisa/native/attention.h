// One row of attention: every key and value is read once, and none beyond the row's position.
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

static float exponentiate(float* row, int begin, int end, float most) {  // returns the sum
    f32s sums = {};
    for (int p = begin; p < end; p += kLanes) {
        f32s weights = exp(load(row + p) - most);
        store(row + p, weights);
        sums += weights;
    }
    return sum_of(sums);
}
