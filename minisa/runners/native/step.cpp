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

template <class T>
struct Scratch {  // grows with the text; what is not used yet takes no memory
    std::unique_ptr<T[]> data;
    size_t size = 0;
    void need(size_t n) {
        if (n <= size) return;
        data.reset();
        data.reset(new T[size = n + n / 4]);
    }
};

struct Own {  // what each thread works with by itself
    Activations activations;           // a row
    std::vector<float> normed;         // a row
    std::vector<float> panel;          // keys or values: kPanel * head_dim
    std::vector<float> weights, sums;  // of queries that attend at once: [queries, kOwnWeights], [queries, head_dim]
};

class Engine {
   public:
    Engine(const Model& model, int n_threads, int max_rows)
        : m(model), n_threads(n_threads), max_rows(max_rows), barrier(n_threads) {
        size_t width = std::max({m.dim, m.hidden_dim, m.n_heads * m.head_dim});
        size_t n_queries = kMostTogether * (m.n_heads / m.n_kv_heads);
        own.resize(n_threads);
        for (Own& mine : own) {
            mine.activations.reserve(width), mine.normed.resize(width), mine.panel.resize(kPanel * m.head_dim);
            mine.weights.resize(n_queries * kOwnWeights), mine.sums.resize(n_queries * m.head_dim);
        }
        shared.reserve(width * max_rows);
        x.resize((size_t)max_rows * m.dim);
        qkv.resize((size_t)max_rows * (m.n_heads + 2 * m.n_kv_heads) * m.head_dim);
        hidden.resize((size_t)max_rows * m.hidden_dim);
        attended.resize((size_t)max_rows * m.n_heads * m.head_dim);
        totals.resize((size_t)max_rows * m.n_heads);
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
        int longest = 0;
        for (int row = 0; row < n_rows; ++row) longest = std::max(longest, length_of(row));
        n_parts = (longest + kPart - 1) / kPart;
        row_size = ((longest + kPanel - 1) / kPanel | 1) * kPanel;  // odd: at powers of two rows collide in the cache
        size_t n_heads = (size_t)n_rows * m.n_heads;
        weights.need(m.n_spans * n_heads * row_size);
        softmax.need((m.n_spans + 1) * n_heads * n_parts);
        if (is_few()) parts.need(n_heads * n_parts * m.head_dim);
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
            attend<Cache>(layer, share);
            barrier.wait();
            matmul(layer.wo, normalize(layer.wo, share), n_rows, share, add_to_x());
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
        Activations& out = count == 1 ? own[share.thread].activations : shared;
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
        float* out = own[share.thread].normed.data();
        return prepare(w, n_rows - first_row, share, [&, out](int row) {
            const float* in = x_of(first_row + row);
            f32s squares = {};
            for (int i = 0; i < m.dim; i += kLanes) squares += load(in + i) * load(in + i);
            float scale = 1.f / std::sqrt(sum_of(squares) / m.dim + m.norm_eps);
            for (int i = 0; i < m.dim; i += kLanes) store(out + i, load(in + i) * scale * load(weight + i));
            return out;
        });
    }

    // Turns queries and keys by their position, scales queries, and appends keys and values to the cache.
    template <class Cache>
    void append(const Layer& layer, Share share) {
        int hd = m.head_dim, n_queries = layer.keys ? m.n_heads : 0, n_keys = layer.keys ? m.n_kv_heads : 0;
        int n_heads = n_queries + n_keys + m.n_kv_heads;
        float scale = 1.f / std::sqrt((float)hd);
        for (int item = share.thread; item < n_rows * n_heads; item += n_threads) {
            int row = item / n_heads, head = item % n_heads;
            float* in = &qkv[((size_t)row * n_heads + head) * hd];
            if (head < n_queries + n_keys) turn(in, row);
            if (head < n_queries) {
                for (int d = 0; d < hd; d += kLanes) store(in + d, load(in + d) * scale);
                continue;
            }
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
    Seen<Cache> seen(void* tensor, int row, int kv_head, int from) {
        int first = (first_seen(row) + from) % m.cache_slots;
        return {cached<Cache>(tensor, row, kv_head), first, m.cache_slots, m.head_dim};
    }

    // A part of a row leaves its unnormalized weights and its Softmax to the span's followers, if it has any.
    template <class Cache>
    void attend(const Layer& layer, Share share) {
        if (is_few()) {
            attend_parts<Cache>(layer, share);
            barrier.wait();
            for (int item = share.thread; item < n_rows * m.n_heads; item += n_threads)
                for (int part = 0, row = item / m.n_heads, head = item % m.n_heads; part < parts_of(row); ++part)
                    add_part(layer, row, head, part, part_of(row, part, head));
        } else if (is_one_text()) {
            int n_blocks = (n_rows + kMostTogether - 1) / kMostTogether;
            for (int item = share.thread; item < m.n_kv_heads * n_blocks; item += n_threads)
                attend_block<Cache>(layer, item / n_blocks, item % n_blocks * kMostTogether, own[share.thread]);
        } else {
            for (int row = share.thread; row < n_rows; row += n_threads)
                attend_row<Cache>(layer, row, own[share.thread]);
        }
    }

    // Few rows: their parts go round the threads.
    template <class Cache>
    void attend_parts(const Layer& layer, Share share) {
        int group = m.n_heads / m.n_kv_heads;
        for (int item = share.thread; item < n_rows * n_parts * m.n_kv_heads; item += n_threads) {
            int row = item / m.n_kv_heads / n_parts, part = item / m.n_kv_heads % n_parts;
            if (part >= parts_of(row)) continue;
            by_heads(group, [&]<int H>(std::integral_constant<int, H>, int offset) {
                int head = item % m.n_kv_heads * group + offset;
                attend_part<H, Cache>(layer, row, head, part, own[share.thread], part_of(row, part, head));
            });
        }
    }

    // Many rows, each of a sequence of its own or with a window of its own.
    template <class Cache>
    void attend_row(const Layer& layer, int row, Own& mine) {
        int group = m.n_heads / m.n_kv_heads;
        for (int kv_head = 0; kv_head < m.n_kv_heads; ++kv_head) {
            by_heads(group, [&]<int H>(std::integral_constant<int, H>, int offset) {
                int head = kv_head * group + offset;
                for (int part = 0; part < parts_of(row); ++part) {
                    attend_part<H, Cache>(layer, row, head, part, mine, mine.sums.data());
                    for (int h = 0; h < H; ++h) add_part(layer, row, head + h, part, &mine.sums[h * m.head_dim]);
                }
            });
        }
    }

    template <int H, class Cache>  // sums [H, head_dim]: what H heads that share keys see in one part of a row
    void attend_part(const Layer& layer, int row, int head, int part, Own& mine, float* sums) {
        int kv_head = head / (m.n_heads / m.n_kv_heads);
        int begin = part * kPart, n = std::min(kPart, length_of(row) - begin);
        float* rows[H];
        for (int h = 0; h < H; ++h) rows[h] = weights_at(layer, row, head + h, part, mine, h);
        if (layer.keys) {
            float most[H];
            score<H>(query_of(row, head), seen<Cache>(layer.keys, row, kv_head, begin), n, rows, most);
            for (int h = 0; h < H; ++h)
                softmax_of(layer.span, row, head + h, part) = {most[h], exponentiate(rows[h], n, most[h])};
        }
        weigh<H>(rows, seen<Cache>(layer.values, row, kv_head, begin), n, sums);
    }

    bool is_few() const { return n_rows < kFewRows; }
    bool is_one_text() const {  // rows that follow each other and see everything before them
        if (first_seen(n_rows - 1) > 0) return false;
        for (int row = 1; row < n_rows; ++row)
            if (sequences[row] != sequences[0] || positions[row] != positions[0] + row) return false;
        return true;
    }

    // A key and value head, and all the queries of up to kMostTogether rows that meet them.
    template <class Cache>
    void attend_block(const Layer& layer, int kv_head, int first, Own& mine) {
        int hd = m.head_dim, group = m.n_heads / m.n_kv_heads, n = std::min(kMostTogether, n_rows - first) * group;
        int length = length_of(first + n / group - 1);
        auto row_of = [=](int i) { return first + i / group; };
        auto head_of = [=](int i) { return kv_head * group + i % group; };
        float* panel = mine.panel.data();
        for (int part = 0; part * kPart < length; ++part) {
            int begin = part * kPart, size = std::min(kPart, length - begin);
            int padded = (size + kPanel - 1) / kPanel * kPanel;
            auto weights = [&](int i) { return weights_at(layer, row_of(i), head_of(i), part, mine, i); };
            auto sums = [&](int i) { return &mine.sums[i * hd]; };
            if (layer.keys) {
                for (int p = 0; p < size; p += kPanel) {
                    lay_out_keys(seen<Cache>(layer.keys, first, kv_head, begin + p), size - p, panel);
                    score_panel(n, [&](int i) { return query_of(row_of(i), head_of(i)); }, panel, hd,
                                [&](int i) { return weights(i) + p; });
                }
                for (int i = 0; i < n; ++i) {
                    float* row = weights(i);
                    int n_seen = std::clamp(length_of(row_of(i)) - begin, 0, size);
                    std::fill(row + n_seen, row + padded, -INFINITY);
                    float most = largest(row, n_seen);
                    softmax_of(layer.span, row_of(i), head_of(i), part) = {most, exponentiate(row, n_seen, most)};
                    std::fill(row + n_seen, row + padded, 0.f);
                }
            }
            memset(mine.sums.data(), 0, sizeof(float) * n * hd);
            for (int p = 0; p < size; p += kPanel) {
                lay_out_values(seen<Cache>(layer.values, first, kv_head, begin + p), size - p, panel);
                weigh_panel(n, [&](int i) { return weights(i) + p; }, panel, hd, sums);
            }
            for (int i = 0; i < n; ++i)
                if (part < parts_of(row_of(i))) add_part(layer, row_of(i), head_of(i), part, sums(i));
        }
    }

    // Puts a part's sums [head_dim] to those of the parts before it. Not inlined, so that it rounds alike everywhere.
    __attribute__((noinline)) void add_part(const Layer& layer, int row, int head, int part, const float* sums) {
        Softmax more = softmax_of(layer.span, row, layer.head_map[head], part), &total = total_of(row, head);
        float* to = attended_of(row, head);
        if (part == 0) {
            total = more;
            memcpy(to, sums, sizeof(float) * m.head_dim);
            return;
        }
        float most = std::max(total.max, more.max);
        float before = std::exp(total.max - most), now = std::exp(more.max - most);
        total = {most, total.sum * before + more.sum * now};
        for (int d = 0; d < m.head_dim; d += kLanes) store(to + d, load(to + d) * before + load(sums + d) * now);
    }

    const Activations& normalize(const Matrix& w, Share share) {  // what attention hands to wo
        float* out = own[share.thread].normed.data();
        return prepare(w, n_rows, share, [&, out](int row) {
            for (int head = 0; head < m.n_heads; ++head) {
                float factor = 1.f / total_of(row, head).sum;
                float *from = attended_of(row, head), *to = out + head * m.head_dim;
                for (int d = 0; d < m.head_dim; d += kLanes) store(to + d, load(from + d) * factor);
            }
            return out;
        });
    }

    static constexpr int kFewRows = 8;        // fewer rows than this share the threads
    static constexpr int kMostTogether = 16;  // rows of a text that attend at once; more would leave threads idle
    static constexpr int kOwnWeights = kPart + kPanel;  // an odd number of panels, as row_size

    int first_seen(int row) const { return m.sliding_window ? std::max(0, positions[row] + 1 - m.sliding_window) : 0; }
    int length_of(int row) const { return positions[row] + 1 - first_seen(row); }
    int parts_of(int row) const { return (length_of(row) + kPart - 1) / kPart; }

    const float* query_of(int row, int head) const {  // in a layer that leads
        return &qkv[((size_t)row * (m.n_heads + 2 * m.n_kv_heads) + head) * m.head_dim];
    }
    // Of one part: in the span's memory, or, where nobody follows, the i-th of the thread's own.
    float* weights_at(const Layer& layer, int row, int head, int part, Own& mine, int i) {
        if (layer.span < 0) return &mine.weights[(size_t)i * kOwnWeights];
        size_t at = ((size_t)layer.span * n_rows + row) * m.n_heads + layer.head_map[head];
        return &weights.data[at * row_size + part * kPart];
    }
    Softmax& softmax_of(int span, int row, int head, int part) {
        return softmax.data[(((size_t)(span + 1) * n_rows + row) * m.n_heads + head) * n_parts + part];
    }
    float* part_of(int row, int part, int head) {
        return &parts.data[(((size_t)row * n_parts + part) * m.n_heads + head) * m.head_dim];
    }
    float* attended_of(int row, int head) { return &attended[((size_t)row * m.n_heads + head) * m.head_dim]; }
    Softmax& total_of(int row, int head) { return totals[(size_t)row * m.n_heads + head]; }

    const Model m;
    const int n_threads, max_rows;
    const int32_t *tokens, *positions, *sequences;
    const float *cos, *sin;
    int n_rows, n_logits;
    int n_parts, row_size;  // of the longest row: its parts, and the room for its weights
    float* logits;

    std::vector<float> x, qkv, hidden;  // [rows, dim], [rows, heads * head_dim], [rows, hidden_dim]
    std::vector<float> attended;        // [rows, n_heads * head_dim]: unnormalized
    std::vector<Softmax> totals;        // [rows, n_heads]: what normalizes them
    Scratch<float> weights;             // unnormalized attention weights: [spans, n_rows, n_heads, row_size]
    Scratch<Softmax> softmax;           // theirs: [spans + 1, n_rows, n_heads, n_parts]
    Scratch<float> parts;               // few rows' sums: [n_rows, n_parts, n_heads, head_dim]
    std::vector<Own> own;
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
