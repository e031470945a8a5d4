#include "safetensors_header.h"

#include <algorithm>
#include <utility>

namespace tacext {
namespace {

constexpr std::size_t kMostNames = 64, kMostDimensions = 8;  // of what is read here
constexpr std::int64_t kLargest = std::int64_t{1} << 40;     // of any size or place: products fit

struct Malformed {
  const char* why;
};

/// The JSON that safetensors headers are made of: objects, strings, and lists of whole numbers.
class Json {
 public:
  Json(const char* begin, const char* end) : at_(begin), end_(end) {}

  /// Calls member(name) for each member, which has to read its value.
  template <class Member>
  void object(const Member& member) {
    expect('{');
    if (next() == '}') {
      ++at_;
      return;
    }
    for (;;) {
      const std::string name = string();
      expect(':');
      member(name);
      if (next() == ',') {
        ++at_;
        continue;
      }
      expect('}');
      return;
    }
  }

  std::string string() {
    expect('"');
    std::string text;
    while (at_ < end_ && *at_ != '"') {
      if (static_cast<unsigned char>(*at_) < 0x20) throw Malformed{"a control character in a name"};
      if (*at_ == '\\') {
        if (end_ - at_ < 2) break;
        // Kept as written but for what can stand for itself: nothing that is looked for has others.
        if (at_[1] != '"' && at_[1] != '\\' && at_[1] != '/') text += '\\';
        ++at_;
      }
      text += *at_++;
    }
    if (at_ == end_) throw Malformed{"a header that ends early"};
    ++at_;
    return text;
  }

  std::vector<std::int64_t> numbers() {
    std::vector<std::int64_t> values;
    expect('[');
    if (next() == ']') {
      ++at_;
      return values;
    }
    for (;;) {
      if (values.size() == kMostDimensions) throw Malformed{"too many dimensions"};
      values.push_back(number());
      if (next() == ',') {
        ++at_;
        continue;
      }
      expect(']');
      return values;
    }
  }

  /// Nothing but blanks may follow.
  void finish() {
    if (next() != '\0' || at_ != end_) throw Malformed{"more than one header"};
  }

 private:
  /// The next character that is no blank; 0 at the end.
  char next() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
    return at_ < end_ ? *at_ : '\0';
  }

  void expect(char wanted) {
    if (at_ == end_ || next() != wanted)
      throw Malformed{"a header that is not that of safetensors"};
    ++at_;
  }

  std::int64_t number() {
    std::int64_t value = 0;
    if (next() < '0' || *at_ > '9') throw Malformed{"a size that is no whole number"};
    for (; at_ < end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      value = 10 * value + (*at_ - '0');
      if (value > kLargest) throw Malformed{"a size out of range"};
    }
    return value;
  }

  const char* at_;
  const char* end_;
};

SafetensorsHeader::Entry read_entry(Json& json) {
  SafetensorsHeader::Entry entry;
  bool placed = false;
  json.object([&](const std::string& name) {
    if (name == "dtype") {
      entry.dtype = json.string();
    } else if (name == "shape") {
      entry.shape = json.numbers();
    } else if (name == "data_offsets") {
      const std::vector<std::int64_t> places = json.numbers();
      if (places.size() != 2) throw Malformed{"a tensor without a place"};
      entry.begin = static_cast<std::uint64_t>(places[0]);
      entry.end = static_cast<std::uint64_t>(places[1]);
      placed = true;
    } else {
      throw Malformed{"a tensor with unknown properties"};
    }
  });
  if (!placed || entry.dtype.empty()) throw Malformed{"a tensor without a type or a place"};
  return entry;
}

void read_header(Json& json, SafetensorsHeader* header) {
  json.object([&](const std::string& name) {
    bool fresh;
    if (name == "__metadata__") {
      fresh = header->metadata.empty();
      json.object([&](const std::string& key) {
        fresh = header->metadata.emplace(key, json.string()).second && fresh;
        if (header->metadata.size() > kMostNames) throw Malformed{"too many entries"};
      });
    } else {
      fresh = header->tensors.emplace(name, read_entry(json)).second;
    }
    if (!fresh) throw Malformed{"one name twice"};
    if (header->tensors.size() > kMostNames) throw Malformed{"too many tensors"};
  });
  json.finish();
}

/// Whether the tensors cover `size` bytes, each of them once.
bool covers(const SafetensorsHeader& header, std::uint64_t size) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> places;
  for (const auto& [name, entry] : header.tensors) places.emplace_back(entry.begin, entry.end);
  std::sort(places.begin(), places.end());
  std::uint64_t at = 0;
  for (const auto& [begin, end] : places) {
    if (begin != at || end < begin) return false;
    at = end;
  }
  return at == size;
}

}  // namespace

std::size_t read_safetensors_header(const char* bytes, std::size_t size, std::uint64_t file_size,
                                    SafetensorsHeader* header, std::string* why) {
  if (size < 8) {
    *why = std::to_string(size) + " bytes";
    return 0;
  }
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(bytes[i]);
  if (length > kLargestHead - 8 || length > size - 8) {
    *why = "a header that is longer than the file, or than that of a guard";
    return 0;
  }
  try {
    Json json(bytes + 8, bytes + 8 + length);
    read_header(json, header);
  } catch (const Malformed& malformed) {
    *why = malformed.why;
    return 0;
  }
  if (!covers(*header, file_size - 8 - length)) {
    *why = "tensors that lie elsewhere than one after the other up to the end";
    return 0;
  }
  return 8 + static_cast<std::size_t>(length);
}

}  // namespace tacext
