// Reads the safetensors file of a guard: an 8-byte length, a JSON header that says where each
// tensor lies, and the tensors. The file may come from anywhere: nothing in it is trusted.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "safetensors_header.h"
#include "tacext/guard.h"

namespace tacext {
namespace {

constexpr std::int64_t kParts = 4;
constexpr std::int64_t kMostCalibration = std::int64_t{1} << 24;  // samples, which float counts
constexpr std::uintmax_t kLargest = std::uintmax_t{4} << 30;      // bytes
constexpr std::size_t kMetadata = 7;                              // entries

struct Refused {
  std::string why;
};

/// One tensor of the file, checked against the shape that it must have.
class Tensors {
 public:
  Tensors(const SafetensorsHeader& header, const char* data, std::size_t size)
      : header_(header), data_(data), size_(size) {}

  const SafetensorsHeader::Entry& entry(const std::string& name) const {
    const auto found = header_.tensors.find(name);
    if (found == header_.tensors.end()) throw Refused{"no tensor '" + name + "'"};
    return found->second;
  }

  template <class T>
  std::vector<T> read(const std::string& name, const std::vector<std::int64_t>& shape) {
    const SafetensorsHeader::Entry& e = entry(name);
    std::uint64_t count = 1, bytes = 0;
    bool huge = false;
    for (const std::int64_t length : shape)
      huge |= __builtin_mul_overflow(count, static_cast<std::uint64_t>(length), &count);
    huge |= __builtin_mul_overflow(count, sizeof(T), &bytes);
    const char* const dtype = std::is_same_v<T, float>    ? "F32"
                              : std::is_same_v<T, double> ? "F64"
                                                          : "I64";
    if (huge || e.dtype != dtype || e.shape != shape || e.begin > e.end || e.end > size_ ||
        e.end - e.begin != bytes)
      throw Refused{"tensor '" + name + "' has another type, shape or place"};
    std::vector<T> values(static_cast<std::size_t>(count));
    if (count > 0) std::memcpy(values.data(), data_ + e.begin, values.size() * sizeof(T));
    for (const T value : values)
      if (!std::isfinite(static_cast<double>(value)))
        throw Refused{"tensor '" + name + "' is not finite"};
    ++read_;
    return values;
  }

  bool all_read() const { return read_ == header_.tensors.size(); }

 private:
  const SafetensorsHeader& header_;
  const char* data_;
  std::size_t size_;
  std::size_t read_ = 0;
};

/// An entry of the metadata, which every guard has.
const std::string& told(const SafetensorsHeader& header, const char* key) {
  const auto found = header.metadata.find(key);
  if (found == header.metadata.end()) throw Refused{std::string("no '") + key + "'"};
  return found->second;
}

/// A whole text as a number, in no locale.
template <class T>
T parse_number(const std::string& text, const char* what) {
  T value{};
  const char *begin = text.data(), *end = begin + text.size();
  const auto [stop, failed] = std::from_chars(begin, end, value);
  if (text.empty() || failed != std::errc() || stop != end) throw Refused{what};
  return value;
}

/// CRC-32 as of zlib.
std::uint32_t checksum(const char* data, std::size_t size) {
  static const std::array<std::uint32_t, 256> table = [] {
    std::array<std::uint32_t, 256> made{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0u);
      made[i] = value;
    }
    return made;
  }();
  std::uint32_t crc = ~0u;
  for (std::size_t i = 0; i < size; ++i)
    crc = table[(crc ^ static_cast<unsigned char>(data[i])) & 0xff] ^ crc >> 8;
  return ~crc;
}

bool all_positive(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float value) { return value > 0; });
}

}  // namespace

struct GuardFile::Content {
  std::vector<float> mean, inverse_spread, basis, near_weight, far_weight, direction, location,
      inverse_deviation, knots, exceeding, head_norms;
  GuardTable table{};
  double rate = 0;

  Content(const SafetensorsHeader& header, const char* data, std::size_t size) {
    const auto format = header.metadata.find("format");
    if (format == header.metadata.end() || format->second != "tacext-guard")
      throw Refused{"not a guard"};
    if (told(header, "version") != "1")
      throw Refused{"a version of the format that this tacext does not know"};
    if (header.metadata.size() != kMetadata) throw Refused{"other metadata than a guard has"};
    told(header, "head");
    told(header, "created_with");
    const std::string& ends = told(header, "ends_in_head");
    if (ends != "true" && ends != "false") throw Refused{"ends_in_head is neither true nor false"};
    const char* const wrong_sum = "the checksum does not fit";
    if (parse_number<std::uint32_t>(told(header, "crc32"), wrong_sum) != checksum(data, size))
      throw Refused{wrong_sum};
    const char* const wrong_rate = "no false_positive_rate between 0 and 1";
    rate = parse_number<double>(told(header, "false_positive_rate"), wrong_rate);
    if (!(rate > 0 && rate < 1)) throw Refused{wrong_rate};
    Tensors tensors(header, data, size);
    const std::vector<std::int64_t> shape = tensors.entry("mean").shape;
    const std::vector<std::int64_t> basis_shape = tensors.entry("basis").shape;
    const std::vector<std::int64_t> knots_shape = tensors.entry("knots").shape;
    if (shape.size() != 2 || basis_shape.size() != 2 || knots_shape.size() != 1)
      throw Refused{"tensors of other shapes"};
    const std::int64_t classes = shape[0], latents = shape[1];
    const std::int64_t ranks = basis_shape[0], knot_count = knots_shape[0];
    if (classes < 2 || latents < 1 || knot_count < 1) throw Refused{"sizes out of range"};
    mean = tensors.read<float>("mean", {classes, latents});
    inverse_spread = tensors.read<float>("inverse_spread", {latents});
    basis = tensors.read<float>("basis", {ranks, latents});
    near_weight = tensors.read<float>("near_weight", {ranks + 1});
    far_weight = tensors.read<float>("far_weight", {ranks + 1});
    direction = tensors.read<float>("direction", {classes, latents});
    location = tensors.read<float>("location", {classes, kParts});
    inverse_deviation = tensors.read<float>("inverse_deviation", {classes, kParts});
    knots = tensors.read<float>("knots", {knot_count});
    exceeding = tensors.read<float>("exceeding", {knot_count + 1});
    head_norms = tensors.read<float>("head_norms", {classes});
    const auto counts = tensors.read<std::int64_t>("class_counts", {classes});
    const std::vector<std::int64_t> norms_shape = tensors.entry("model_norms").shape;
    if (norms_shape.size() != 1) throw Refused{"tensors of other shapes"};
    tensors.read<double>("model_norms", norms_shape);
    const float threshold = tensors.read<float>("threshold", {})[0];
    const std::int64_t samples = tensors.read<std::int64_t>("samples", {})[0];
    if (!tensors.all_read()) throw Refused{"tensors that no guard has"};
    if (samples < 1 || samples > kMostCalibration) throw Refused{"no calibration samples"};
    if (!std::is_sorted(knots.begin(), knots.end()) ||
        !std::is_sorted(exceeding.rbegin(), exceeding.rend()) ||
        exceeding.front() != static_cast<float>(samples) || exceeding.back() < 0)
      throw Refused{"a calibration out of order"};
    std::int64_t counted = 0;
    for (const std::int64_t count : counts) {
      if (count < 0 || count > samples) throw Refused{"classes with another number of samples"};
      counted += count;
    }
    if (counted != samples) throw Refused{"classes with another number of samples"};
    if (!all_positive(inverse_spread) || !all_positive(inverse_deviation))
      throw Refused{"a spread that is not positive"};
    // The lowest knot beyond which a p-value is at most the rate, as Python finds it.
    std::size_t enough = 0;
    while (enough < exceeding.size() &&
           (1 + static_cast<double>(exceeding[enough])) / static_cast<double>(1 + samples) >
               rate * (1 + 1e-12))
      ++enough;
    if (enough == 0 || enough == exceeding.size() || threshold != knots[enough - 1])
      throw Refused{"a threshold that is not that of the rate"};
    table = {classes,
             latents,
             ranks,
             knot_count,
             mean.data(),
             inverse_spread.data(),
             basis.data(),
             near_weight.data(),
             far_weight.data(),
             direction.data(),
             location.data(),
             inverse_deviation.data(),
             knots.data(),
             exceeding.data(),
             threshold,
             samples};
  }
};

GuardFile::GuardFile(std::unique_ptr<Content> content) : content_(std::move(content)) {}
GuardFile::~GuardFile() = default;

const GuardTable& GuardFile::table() const { return content_->table; }
double GuardFile::false_positive_rate() const { return content_->rate; }
const float* GuardFile::head_norms() const { return content_->head_norms.data(); }

namespace {

std::string refusal(const std::string& argument, const std::string& got) {
  return "tacext guard: " + argument + ": expected what tacext.Guard.save wrote, got " + got +
         "; copy it again, or fit the guard again";
}

}  // namespace

std::unique_ptr<GuardFile> GuardFile::parse_as(const char* argument, const void* bytes,
                                               std::size_t size, std::string* error) {
  std::string why;
  try {
    SafetensorsHeader header;
    const char* const data = static_cast<const char*>(bytes);
    const std::size_t start = read_safetensors_header(data, size, size, &header, &why);
    if (start != 0) {
      auto content = std::make_unique<Content>(header, data + start, size - start);
      return std::unique_ptr<GuardFile>(new GuardFile(std::move(content)));
    }
  } catch (const Refused& refused) {
    why = refused.why;
  }
  if (error != nullptr)
    *error = refusal(argument, "a truncated, damaged or foreign file (" + why + ")");
  return nullptr;
}

std::unique_ptr<GuardFile> GuardFile::parse(const void* bytes, std::size_t size,
                                            std::string* error) {
  return parse_as("bytes", bytes, size, error);
}

std::unique_ptr<GuardFile> GuardFile::read(const char* path, std::string* error) {
  const std::string named = std::string("path ") + path;
  const auto refuse = [&](const std::string& got) {
    if (error != nullptr) *error = refusal(named, got);
    return nullptr;
  };
  std::error_code failure;
  const bool regular = std::filesystem::is_regular_file(path, failure);
  const std::uintmax_t size = regular ? std::filesystem::file_size(path, failure) : 0;
  if (!regular || failure) return refuse("no regular file that can be read");
  std::ifstream file(path, std::ios::binary);
  if (!file) return refuse("no file that can be read");
  if (size > kLargest) return refuse("a file that is far too large for one");
  // The header first: a file of something else is not read any further.
  std::vector<char> bytes(static_cast<std::size_t>(std::min(size, kLargestHead)));
  SafetensorsHeader header;
  std::string why = "it cannot be read";
  if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size())) ||
      read_safetensors_header(bytes.data(), bytes.size(), size, &header, &why) == 0)
    return refuse("a truncated, damaged or foreign file (" + why + ")");
  const std::size_t first = bytes.size();
  bytes.resize(static_cast<std::size_t>(size));
  if (!file.read(bytes.data() + first, static_cast<std::streamsize>(bytes.size() - first)))
    return refuse("a file that cannot be read to its end");
  return parse_as(named.c_str(), bytes.data(), bytes.size(), error);
}

}  // namespace tacext
