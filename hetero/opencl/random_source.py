"""Random numbers as functions of generated kernels: each takes (element, key, stream).

Element i of a stream has words of 32 bits that nothing else has: `bits1` is its own word, `bits2` are two words of its
own in 64 bits. They are words of Philox4x32-10 blocks with counter (i, stream) and the key (Salmon, Moraes, Dror and
Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11); written for all i alike, so that loops are vectorised.
"""

_PHILOX = """
static inline void philox(uint *word, ulong block, ulong key, ulong stream)
{
    uint c0 = (uint)block, c1 = (uint)(block >> 32), c2 = (uint)stream, c3 = (uint)(stream >> 32);
    uint k0 = (uint)key, k1 = (uint)(key >> 32);
    #pragma unroll
    for (int round = 0; round < 10; round++) {
        const ulong a = (ulong)c0 * 0xD2511F53ul, b = (ulong)c2 * 0xCD9E8D57ul;
        c0 = (uint)(b >> 32) ^ c1 ^ k0;
        c1 = (uint)b;
        c2 = (uint)(a >> 32) ^ c3 ^ k1;
        c3 = (uint)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
}
"""

FUNCTIONS = {
    "philox": _PHILOX,
    # Word i % 4 of block i / 4.
    "bits1": """
static inline uint bits1(ulong i, ulong key, ulong stream)
{
    uint w[4];
    philox(w, i >> 2, key, stream);
    return i & 2 ? (i & 1 ? w[3] : w[2]) : (i & 1 ? w[1] : w[0]);
}
""",
    # Words 2 (i % 2) and 2 (i % 2) + 1 of block i / 2.
    "bits2": """
static inline ulong bits2(ulong i, ulong key, ulong stream)
{
    uint w[4];
    philox(w, i >> 1, key, stream);
    return i & 1 ? (ulong)w[2] << 32 | w[3] : (ulong)w[0] << 32 | w[1];
}
""",
    # [0, 1): the leading 24 bits, as torch.
    "uniform1": """
static inline float uniform1(ulong i, ulong key, ulong stream)
{
    return (float)(int)(bits1(i, key, stream) >> 8) * 5.9604644775390625e-8f;
}
""",
    # [0, 1): the leading 53 bits.
    "uniform2": """
static inline double uniform2(ulong i, ulong key, ulong stream)
{
    return (double)(bits2(i, key, stream) >> 11) * 1.1102230246251565e-16;
}
""",
    # cos(2 pi word / 2^32): Cephes' sinf and cosf within an eighth of a turn of the nearest quarter turn. 2 ulp of 1.
    "cos_turn": """
static inline float cos_turn(uint word)
{
    const uint quarter = (word + 0x20000000u) >> 30;
    const float x = (float)(int)(word - (quarter << 30)) * 1.46291807926715968e-9f, z = x * x;
    const float sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
    float cosine = 2.443315711809948e-5f * z - 1.388731625493765e-3f;
    cosine = (cosine * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
    const float near = quarter & 1 ? sine : cosine;
    return quarter == 1 || quarter == 2 ? -near : near;
}
""",
    # Box and Muller, "A note on the generation of random normal deviates", 1958: the cosine alone. |result| < 6.7.
    "normal1": """
static inline float normal1(ulong i, ulong key, ulong stream)
{
    const ulong w = bits2(i, key, stream);
    const float u = ((float)(uint)(w >> 32) + 0.5f) * 2.3283064365386963e-10f;
    return sqrt1(-2.0f * log1(u)) * cos_turn((uint)w);
}
""",
    # The same with blocks of their own, 53 and 64 bits.
    "normal2": """
static inline double normal2(ulong i, ulong key, ulong stream)
{
    uint w[4];
    philox(w, i, key, stream);
    const double u = ((double)(((ulong)w[0] << 32 | w[1]) >> 11) + 0.5) * 1.1102230246251565e-16;
    return sqrt(-2 * log(u)) * cospi(2 * (double)((ulong)w[2] << 32 | w[3]) * 5.421010862427522e-20);
}
""",
}
NEEDS = {
    "bits1": ("philox",),
    "bits2": ("philox",),
    "uniform1": ("philox", "bits1"),
    "uniform2": ("philox", "bits2"),
    "normal1": ("philox", "bits2", "log1", "sqrt1", "cos_turn"),
    "normal2": ("philox",),
}
