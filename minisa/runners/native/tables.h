// The tables that native/runner.py fills in: where the weights and the cache lie, and who follows whom.
#pragma once
#include <cstdint>

enum Format : int32_t { kBf16, kInt8, kInt4 };

struct Matrix {  // [rows, cols] in panels of 32 rows; cols is a multiple of 32
    const uint8_t* data;
    int32_t format, rows, cols, reserved;
};

struct Layer {
    const float *attention_norm, *ffn_norm;  // [dim]
    Matrix wqkv;                             // queries, keys, values; in a follower values only
    Matrix wo, w13, w2;                      // w13: 16 gate rows and 16 up rows in each panel
    void *keys, *values;                     // [batch, n_kv_heads, cache_slots, head_dim]; a follower has no keys
    const int32_t* head_map;                 // [n_heads]: whose attention weights each query head uses
    int32_t span;                            // where its span keeps its attention weights; -1: it leads nobody
    int32_t reserved;
};

struct Model {
    int32_t dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size;
    int32_t cache_slots;      // of a row: position p lies in slot p % cache_slots
    int32_t sliding_window;   // tokens a query looks back over, itself included; 0: all
    int32_t n_spans;          // alive at the same time
    int32_t cache_format;     // 0 fp32, 1 bf16, 2 fp8 (e4m3)
    float norm_eps;
    Matrix embedding, head;   // the same panels where they are tied
    const float* final_norm;  // [dim]
    const Layer* layers;
};
