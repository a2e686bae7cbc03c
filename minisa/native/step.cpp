// One step of a Llama with Shared Attention on a CPU: n rows in, logits out.
//
// A row is one token of one sequence at one position. Decoding is a row for each sequence of the batch, prefill a
// chunk of rows of the same sequence: both run the same code. `Engine::run` reads top-down like the diagram in
// minisa/model.py. Weights come packed from native/packing.py.
#include <memory>

#include "attention.h"
#include "matmul.h"
#include "tables.h"
#include "threads.h"
#include "vectors.h"

class Engine {
   public:
    Engine(const Model& model, int n_threads, int max_rows)
        : m(model), n_threads(n_threads), max_rows(max_rows), barrier(n_threads) {
        size_t width = std::max({m.dim, m.hidden_dim, m.n_heads * m.head_dim});
        own.resize(n_threads);
        panels.assign(n_threads, std::vector<float>(kPanel * m.head_dim));
        for (auto& activations : own) activations.reserve(width);
        shared.reserve(width * max_rows);
        normed.resize(n_threads * width);
        x.resize((size_t)max_rows * m.dim);
        qkv.resize((size_t)max_rows * (m.n_heads + 2 * m.n_kv_heads) * m.head_dim);
        hidden.resize((size_t)max_rows * m.hidden_dim);
        parts.resize((size_t)max_parts() * m.n_heads * m.head_dim);
        softmax.resize((size_t)(m.n_spans + 1) * max_parts() * m.n_heads);
        team = std::make_unique<Team>(n_threads, [this](int thread) {
            Share share{thread, this->n_threads};
            m.cache_format == 0 ? run<float>(share) : m.cache_format == 1 ? run<bf16>(share) : run<fp8>(share);
        });
    }

    // tokens, positions, sequences (rows of the cache): [n_rows]; cos, sin, of the positions' angles: [n_rows,
    // head_dim / 2]; logits: [n_logits, vocab_size], of the last rows.
    void step(const int32_t* tokens, const int32_t* positions, const int32_t* sequences, const float* cos,
              const float* sin, int n_rows, int n_logits, float* logits) {
        this->tokens = tokens, this->positions = positions, this->sequences = sequences;
        this->cos = cos, this->sin = sin, this->n_rows = n_rows, this->n_logits = n_logits, this->logits = logits;
        n_splits = n_rows < kFewRows ? n_threads : 1;
        int longest = 0;
        for (int row = 0; row < n_rows; ++row) longest = std::max(longest, positions[row] + 1 - first_seen(row));
        row_size = ((longest + kPanel - 1) / kPanel | 1) * kPanel;  // odd: at powers of two rows collide in the cache
        int group = m.n_heads / m.n_kv_heads;
        together = std::clamp(kAtHand / (group * row_size), 1, kMostTogether);
        n_own = std::max(kHeads, together * group);
        size_t needed = ((size_t)m.n_spans * n_rows * m.n_heads + n_threads * n_own) * row_size;
        if (needed > n_weights) {  // what is not used yet takes no memory
            weights.reset();
            weights.reset(new float[n_weights = needed + needed / 4]);
        }
        team->run();
    }

   private:
    template <class Cache>
    void run(Share share) {
        for (int row = share.thread; row < n_rows; row += n_threads) read_row(m.embedding, tokens[row], x_of(row));
        barrier.wait();
        for (int l = 0; l < m.n_layers; ++l) {
            const Layer& layer = m.layers[l];
            int width = layer.wqkv.rows;  // a follower's row of qkv is its value alone
            matmul(layer.wqkv, norm(layer.attention_norm, layer.wqkv, 0, share), n_rows, share,
                   [&](int row, int panel, auto& out) { put(&qkv[(size_t)row * width], width, panel, out); });
            barrier.wait();
            append<Cache>(layer, share);
            barrier.wait();
            if (is_one_text()) attend_together<Cache>(layer, share);
            else attend<Cache>(layer, share);
            barrier.wait();
            matmul(layer.wo, merge(layer, share), n_rows, share, add_to_x());
            barrier.wait();
            matmul(layer.w13, norm(layer.ffn_norm, layer.w13, 0, share), n_rows, share,
                   [&](int row, int panel, auto& out) {
                       float* to = &hidden[(size_t)row * m.hidden_dim + panel * kPanel / 2];
                       for (int v = 0; v < kVectors / 2; ++v) {
                           f32s gate = out[v], up = out[v + kVectors / 2];
                           store(to + v * kLanes, gate / (1.f + exp(-gate)) * up);
                       }
                   });
            barrier.wait();
            matmul(layer.w2, prepare(layer.w2, n_rows, share, [&](int row) { return &hidden[(size_t)row * m.hidden_dim]; }),
                   n_rows, share, add_to_x());
            barrier.wait();
        }
        if (n_logits) {
            matmul(m.head, norm(m.final_norm, m.head, n_rows - n_logits, share), n_logits, share,
                   [&](int row, int panel, auto& out) {
                       put(logits + (size_t)row * m.vocab_size, m.vocab_size, panel, out);
                   });
        }
        barrier.wait();
    }

    float* x_of(int row) { return &x[(size_t)row * m.dim]; }

    static void put(float* row, int width, int panel, const f32s (&out)[kVectors]) {  // the last panel may be padded
        memcpy(row + panel * kPanel, out, sizeof(float) * std::min(kPanel, width - panel * kPanel));
    }
    auto add_to_x() {
        return [this](int row, int panel, auto& out) {
            float* to = x_of(row) + panel * kPanel;
            for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, load(to + v * kLanes) + out[v]);
        };
    }

    // Rounds rows for a matmul. Of a single row every thread makes a copy, which is quicker than to wait for another's.
    template <class Row>
    const Activations& prepare(const Matrix& w, int count, Share share, Row row_of) {
        Activations& out = count == 1 ? own[share.thread] : shared;
        if (count == 1) {
            out.cols = w.cols;
            out.set(0, row_of(0), w.format);
            return out;
        }
        if (share.thread == 0) out.cols = w.cols;
        barrier.wait();
        for (int row = share.thread; row < count; row += n_threads) out.set(row, row_of(row), w.format);
        barrier.wait();
        return out;
    }

    const Activations& norm(const float* weight, const Matrix& w, int first_row, Share share) {
        float* out = &normed[(size_t)share.thread * (normed.size() / n_threads)];
        return prepare(w, n_rows - first_row, share, [&, out](int row) {
            const float* in = x_of(first_row + row);
            f32s squares = {};
            for (int i = 0; i < m.dim; i += kLanes) squares += load(in + i) * load(in + i);
            float scale = 1.f / std::sqrt(sum_of(squares) / m.dim + m.norm_eps);
            for (int i = 0; i < m.dim; i += kLanes) store(out + i, load(in + i) * scale * load(weight + i));
            return out;
        });
    }

    // Turns queries and keys by their position, and appends keys and values to the cache.
    template <class Cache>
    void append(const Layer& layer, Share share) {
        int hd = m.head_dim, n_queries = layer.keys ? m.n_heads : 0, n_keys = layer.keys ? m.n_kv_heads : 0;
        int n_heads = n_queries + n_keys + m.n_kv_heads;
        for (int item = share.thread; item < n_rows * n_heads; item += n_threads) {
            int row = item / n_heads, head = item % n_heads;
            float* in = &qkv[((size_t)row * n_heads + head) * hd];
            if (head < n_queries + n_keys) turn(in, row);
            if (head < n_queries) continue;
            int kv_head = (head - n_queries) % m.n_kv_heads;
            Cache* out = cached<Cache>(head < n_queries + n_keys ? layer.keys : layer.values, row, kv_head);
            out += (size_t)(positions[row] % m.cache_slots) * hd;
            for (int d = 0; d < hd; d += kLanes) store(out + d, load(in + d));
        }
    }

    void turn(float* head, int row) {  // rotary embedding, the two halves of a head as real and imaginary parts
        int half = m.head_dim / 2, at = row * half;
        for (int i = 0; i < half; i += kLanes) {
            f32s a = load(head + i), b = load(head + half + i), c = load(cos + at + i), s = load(sin + at + i);
            store(head + i, a * c - b * s);
            store(head + half + i, b * c + a * s);
        }
    }

    template <class Cache>
    Cache* cached(void* tensor, int row, int kv_head) {
        return (Cache*)tensor + ((size_t)sequences[row] * m.n_kv_heads + kv_head) * m.cache_slots * m.head_dim;
    }
    template <class Cache>
    Seen<Cache> seen(void* tensor, int row, int kv_head) {
        return {cached<Cache>(tensor, row, kv_head), first_seen(row) % m.cache_slots, m.cache_slots, m.head_dim};
    }

    // A few rows: each is split by positions between the threads; many: every thread has rows of its own.
    // A part of a row leaves its unnormalized weights and its Softmax to the span's followers, if it has any.
    template <class Cache>
    void attend(const Layer& layer, Share share) {
        int hd = m.head_dim, group = m.n_heads / m.n_kv_heads, n_values = layer.keys ? m.n_heads + 2 * m.n_kv_heads : 0;
        for (int item = share.thread; item < n_rows * n_splits; item += n_threads) {
            int row = item / n_splits, length = positions[row] + 1 - first_seen(row);
            Share part{item % n_splits, n_splits};  // in whole vectors, whose last lanes may lie beyond `length`
            int n_vectors = (length + kLanes - 1) / kLanes;
            int begin = part.begin(n_vectors) * kLanes, end = std::min(length, part.end(n_vectors) * kLanes);
            for (int kv_head = 0; kv_head < m.n_kv_heads; ++kv_head) {
                by_heads(group, [&]<int H>(std::integral_constant<int, H>, int offset) {
                    int head = kv_head * group + offset;
                    float* rows[H];
                    for (int h = 0; h < H; ++h) {
                        rows[h] = layer.span < 0 ? own_weights(share.thread, h)
                                                 : weights_of(layer.span, row, layer.head_map[head + h]);
                    }
                    if (layer.keys) {
                        Softmax* softmax = &softmax_of(layer.span, item, head);
                        const float* q = &qkv[(size_t)row * n_values * hd + head * hd];
                        score<H>(q, seen<Cache>(layer.keys, row, kv_head), begin, end, 1.f / std::sqrt((float)hd), rows,
                                 softmax);
                        for (int h = 0; h < H; ++h) softmax[h].sum = exponentiate(rows[h], begin, end, softmax[h].max);
                    }
                    weigh<H>(rows, seen<Cache>(layer.values, row, kv_head), begin, end, part_of(item, head));
                });
            }
        }
    }

    bool is_one_text() const {  // many rows that follow each other, see everything before them, and attend in company
        if (n_rows < kFewRows || n_own < kWorthwhile || first_seen(n_rows - 1) > 0) return false;
        for (int row = 1; row < n_rows; ++row)
            if (sequences[row] != sequences[0] || positions[row] != positions[0] + row) return false;
        return true;
    }

    // A thread takes a key and value head and a few rows: all the queries that meet them.
    template <class Cache>
    void attend_together(const Layer& layer, Share share) {
        int n_blocks = (n_rows + together - 1) / together;
        for (int item = share.thread; item < m.n_kv_heads * n_blocks; item += n_threads) {
            int first = item % n_blocks * together;
            attend_block<Cache>(layer, item / n_blocks, first, std::min(together, n_rows - first), share.thread);
        }
    }

    template <class Cache>
    void attend_block(const Layer& layer, int kv_head, int first, int count, int thread) {
        int hd = m.head_dim, group = m.n_heads / m.n_kv_heads, n = count * group, width = m.n_heads + 2 * m.n_kv_heads;
        int length = positions[first + count - 1] + 1, padded = (length + kPanel - 1) / kPanel * kPanel;
        auto row_of = [=](int i) { return first + i / group; };
        auto head_of = [=](int i) { return kv_head * group + i % group; };
        auto query_of = [=, this](int i) { return &qkv[((size_t)row_of(i) * width + head_of(i)) * hd]; };
        auto sums_of = [=, this](int i) { return part_of(row_of(i), head_of(i)); };
        auto weights_at = [=, this](int i) {
            return layer.span < 0 ? own_weights(thread, i)
                                  : weights_of(layer.span, row_of(i), layer.head_map[head_of(i)]);
        };
        float* panel = panels[thread].data();
        if (layer.keys) {
            float scale = 1.f / std::sqrt((float)hd);
            for (int p = 0; p < length; p += kPanel) {
                lay_out_keys(seen<Cache>(layer.keys, first, kv_head), p, length, panel);
                by_panel(n, query_of, panel, hd, kPanel, [&](int i, auto& products) {
                    for (int v = 0; v < kVectors; ++v) store(weights_at(i) + p + v * kLanes, products[v] * scale);
                });
            }
            for (int i = 0; i < n; ++i) {
                float* weights = weights_at(i);
                int end = positions[row_of(i)] + 1;
                std::fill(weights + end, weights + padded, -INFINITY);
                float most = largest(weights, end);
                softmax_of(layer.span, row_of(i), head_of(i)) = {most, exponentiate(weights, 0, end, most)};
                std::fill(weights + end, weights + padded, 0.f);
            }
        }
        for (int i = 0; i < n; ++i) memset(sums_of(i), 0, sizeof(float) * hd);
        for (int p = 0; p < length; p += kPanel) {
            lay_out_values(seen<Cache>(layer.values, first, kv_head), p, length, panel);
            for (int d = 0; d < hd; d += kPanel) {
                by_panel(n, [&](int i) { return weights_at(i) + p; }, panel + d, kPanel, hd, [&](int i, auto& products) {
                    float* sums = sums_of(i) + d;
                    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, load(sums + v * kLanes) + products[v]);
                });
            }
        }
    }

    // What attention hands to wo: the parts of each row put together, and normalized.
    const Activations& merge(const Layer& layer, Share share) {
        float* out = &normed[(size_t)share.thread * (normed.size() / n_threads)];
        return prepare(layer.wo, n_rows, share, [&, out](int row) {
            for (int head = 0; head < m.n_heads; ++head) {
                int source = layer.head_map[head];
                float most = -INFINITY, sum = 0;
                for (int i = 0; i < n_splits; ++i)
                    most = std::max(most, softmax_of(layer.span, row * n_splits + i, source).max);
                for (int i = 0; i < n_splits; ++i) {
                    Softmax part = softmax_of(layer.span, row * n_splits + i, source);
                    sum += part.sum * std::exp(part.max - most);
                }
                float* to = out + head * m.head_dim;
                memset(to, 0, sizeof(float) * m.head_dim);
                for (int i = 0; i < n_splits; ++i) {
                    float factor = std::exp(softmax_of(layer.span, row * n_splits + i, source).max - most) / sum;
                    const float* from = part_of(row * n_splits + i, head);
                    for (int d = 0; d < m.head_dim; d += kLanes) store(to + d, load(to + d) + load(from + d) * factor);
                }
            }
            return out;
        });
    }

    static constexpr int kWorthwhile = 16;      // queries that meet a panel: fewer do not pay for laying it out
    static constexpr int kMostTogether = 16;    // rows: more would leave threads without work
    static constexpr int kAtHand = 1 << 19;     // attention weights of a thread's own, for one token at least
    // More than a step with guesses feeds (speculate.py): its sums are to be those of one row.
    static constexpr int kFewRows = 8;
    int first_seen(int row) const { return m.sliding_window ? std::max(0, positions[row] + 1 - m.sliding_window) : 0; }
    int max_parts() const { return std::max(max_rows, kFewRows * n_threads); }
    float* weights_of(int span, int row, int head) {
        return &weights[(((size_t)span * n_rows + row) * m.n_heads + head) * row_size];
    }
    float* own_weights(int thread, int i) { return weights_of(m.n_spans, 0, 0) + ((size_t)thread * n_own + i) * row_size; }
    Softmax& softmax_of(int span, int part, int head) {
        return softmax[((size_t)(span + 1) * max_parts() + part) * m.n_heads + head];
    }
    float* part_of(int part, int head) { return &parts[((size_t)part * m.n_heads + head) * m.head_dim]; }

    const Model m;
    const int n_threads, max_rows;
    const int32_t *tokens, *positions, *sequences;
    const float *cos, *sin;
    int n_rows, n_logits, n_splits;
    float* logits;

    std::vector<float> x, qkv, hidden;  // [rows, dim], [rows, heads * head_dim], [rows, hidden_dim]
    std::vector<float> parts;           // [row parts, n_heads * head_dim]: attention's unnormalized sums
    // Unnormalized attention weights of what a row sees: [spans, n_rows, n_heads, row_size], then those of layers that
    // lead nobody, for each thread those at hand: [n_threads, n_own, row_size].
    std::unique_ptr<float[]> weights;
    size_t n_weights = 0;               // allocated
    int row_size = 0, n_own = 0;
    int together = 0;                   // rows of a text that attend at once
    std::vector<Softmax> softmax;       // [spans + 1, row parts, n_heads]
    std::vector<float> normed;          // a row for each thread
    std::vector<std::vector<float>> panels;  // one for each thread
    std::vector<Activations> own;       // one for each thread
    Activations shared;
    Barrier barrier;
    std::unique_ptr<Team> team;
};

extern "C" {
void* engine_open(const Model* model, int n_threads, int max_rows) { return new Engine(*model, n_threads, max_rows); }
void engine_step(void* engine, const int32_t* tokens, const int32_t* positions, const int32_t* sequences,
                 const float* cos, const float* sin, int n_rows, int n_logits, float* logits) {
    ((Engine*)engine)->step(tokens, positions, sequences, cos, sin, n_rows, n_logits, logits);
}
void engine_close(void* engine) { delete (Engine*)engine; }
}
