// SPDX-License-Identifier: Apache-2.0
// What a 32-bit word of an operand holds: one float, or two neighbours along k in bfloat16. The loops of a product are
// the same for both; only loading words and the step that multiplies them differ. Included inside a level's namespace.

constexpr int kTileVecs = 2;
constexpr int kTileColumns = kTileVecs * kLanes;  // register tile of the products: kTileRows x kTileColumns

template <class T>
Vec load_some(const T* from, int count) {
  return count == kLanes ? load(from) : load_part(from, count);
}

template <class T>
void store_some(T* to, Vec value, int count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_part(to, value, count);
  }
}

// Bits of the dropout mask, one per column, 16 to a number: those of `kLanes` columns from `column` on.
inline uint32_t lane_bits(const uint16_t* bits, int64_t column) {
  return static_cast<uint32_t>(bits[column / 16]) >> (column % 16);
}

struct Floats {
  static constexpr int kPerWord = 1;
  static Vec step(Vec a, Vec b, Vec c) { return multiply_add(a, b, c); }

  // Words along k, from memory contiguous along k: up to kLanes, of `elements_left` elements there are, the rest zero.
  template <class T>
  static Vec along_k(const T* from, int words, int64_t /*elements_left*/) {
    return load_some(from, words);
  }
  // The same, whole, without what the mask drops.
  template <class T>
  static Vec kept_along_k(const T* from, const uint16_t* bits, int64_t column) {
    return keep(load(from), lane_bits(bits, column));
  }
  // Words across k, from memory contiguous across k: word i belongs to row or column i.
  template <class T>
  static Vec across_k(const T* from, int64_t /*k_stride*/, int64_t /*elements_left*/, int count) {
    return load_some(from, count);
  }
  template <class T>
  static float single(const T* from, int64_t /*k_stride*/, int64_t /*elements_left*/) {
    return to_float(*from);
  }
  // One word a column from the values of a whole word's rows of k.
  static Vec words_of(const Vec* rows) { return rows[0]; }
  // Places one value of k-row `k` into a list of words.
  static void put(float* words, int64_t word, int /*part*/, float value) { words[word] = value; }
};

#if defined(DMOLE_LEVEL_PAIRS)
struct Pairs {
  static constexpr int kPerWord = 2;
  static Vec step(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  static Vec along_k(const bfloat16* from, int words, int64_t elements_left) {
    const int64_t elements = elements_left < 2 * words ? elements_left : 2 * words;
    const auto mask = static_cast<__mmask32>((uint64_t{1} << elements) - 1u);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from));
  }
  static Vec kept_along_k(const bfloat16* from, const uint16_t* bits, int64_t column) {
    uint32_t both;
    std::memcpy(&both, bits + column / 16, sizeof(both));
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(both, from));
  }
  static Vec across_k(const bfloat16* from, int64_t k_stride, int64_t elements_left, int count) {
    const uint32_t mask = (1u << count) - 1u;
    return pair_rows(from, mask, elements_left > 1 ? from + k_stride : from, elements_left > 1 ? mask : 0u);
  }
  static float single(const bfloat16* from, int64_t k_stride, int64_t elements_left) {
    const uint32_t high = elements_left > 1 ? from[k_stride].bits : 0u;
    const uint32_t bits = from->bits | (high << 16);
    float word;
    std::memcpy(&word, &bits, sizeof(word));
    return word;
  }
  static Vec words_of(const Vec* rows) { return pair_values(rows[0], rows[1]); }
  static void put(float* words, int64_t word, int part, float value) {
    const bfloat16 rounded = from_float<bfloat16>(value);
    std::memcpy(reinterpret_cast<char*>(words + word) + 2 * part, &rounded, sizeof(rounded));
  }
};
#endif

template <class TA, class TB>
struct UnitOf {
  using type = Floats;
};
#if defined(DMOLE_LEVEL_PAIRS)
template <>
struct UnitOf<bfloat16, bfloat16> {
  using type = Pairs;
};
#endif
