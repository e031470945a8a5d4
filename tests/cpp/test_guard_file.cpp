#include <gtest/gtest.h>
#include <sys/stat.h>

#include <clocale>
#include <cstdio>
#include <fstream>
#include <random>
#include <thread>

#include "guard_support.h"
#include "tacext/tacext.h"

namespace tacext {
namespace {

using test::RandomGuard;

std::string replaced(std::string text, const std::string& old, const std::string& with) {
  const std::size_t at = text.find(old);
  EXPECT_NE(at, std::string::npos) << old;
  return text.replace(at, old.size(), with);
}

std::unique_ptr<GuardFile> parse(const std::string& bytes, std::string* error) {
  return GuardFile::parse(bytes.data(), bytes.size(), error);
}

TEST(GuardFiles, HoldTheGuard) {
  const RandomGuard g(5, 21, 6, 12);
  std::string error = "none";
  const auto file = parse(RandomGuard::join(g.parts()), &error);
  ASSERT_NE(file, nullptr) << error;
  EXPECT_EQ(file->false_positive_rate(), g.rate);
  EXPECT_EQ(file->table().samples, 96);
  EXPECT_EQ(file->table().threshold, g.threshold);
  EXPECT_EQ(std::vector<float>(file->head_norms(), file->head_norms() + 5), g.head_norms);
  const auto x = test::as_elements<float>(test::normal_values(4 * 21, 5));
  const auto z = test::as_elements<float>(test::normal_values(4 * 5, 6));
  std::vector<float> a(4), b(4), p(4);
  bool flagged[4];
  guard_score<float>(g.table(), {x.data(), 21, z.data(), 5, 4}, {a.data(), p.data(), flagged},
                     serial_for);
  guard_score<float>(file->table(), {x.data(), 21, z.data(), 5, 4}, {b.data(), p.data(), flagged},
                     serial_for);
  EXPECT_EQ(a, b);
}

TEST(GuardFiles, ThatAreWrongSayWhy) {
  const RandomGuard g(5, 21, 6, 12);
  const RandomGuard::Parts good = g.parts();
  const auto expect_refused = [&](RandomGuard::Parts parts, const char* why) {
    std::string error;
    EXPECT_EQ(parse(RandomGuard::join(parts), &error), nullptr) << why;
    EXPECT_NE(error.find(why), std::string::npos) << error << " should say: " << why;
  };
  const auto metadata = [&](const std::string& old, const std::string& with) {
    RandomGuard::Parts parts = good;
    parts.metadata = replaced(parts.metadata, old, with);
    return parts;
  };
  const auto tensors = [&](const std::string& old, const std::string& with) {
    RandomGuard::Parts parts = good;
    parts.tensors = replaced(parts.tensors, old, with);
    return parts;
  };
  expect_refused(metadata("tacext-guard", "pt"), "not a guard");
  expect_refused(metadata("\"version\":\"1\"", "\"version\":\"2\""), "a version of the format");
  char rate[40];
  std::snprintf(rate, sizeof rate, "%.17g", g.rate);
  for (const char* wrong : {"1.5", "0", "nan", "", "0.01x", " 0.01", "0x1p-5", "0,01"})
    expect_refused(metadata(rate, wrong), "false_positive_rate");
  expect_refused(metadata(rate, "0.5"), "a threshold that is not that of the rate");
  expect_refused(metadata("CRC", "1234567"), "the checksum does not fit");
  expect_refused(metadata("CRC", "x"), "the checksum does not fit");
  expect_refused(metadata("\"true\"", "\"yes\""), "neither true nor false");
  expect_refused(metadata("\"head\"", "\"body\""), "no 'head'");
  expect_refused(metadata("{", R"({"more":"",)"), "other metadata");
  expect_refused(metadata("{", R"({"format":"",)"), "one name twice");
  expect_refused(metadata("\"format\"", "5"), "not that of safetensors");
  expect_refused(tensors("\"basis\"", "\"bases\""), "no tensor 'basis'");
  expect_refused(tensors("\"knots\"", "\"mean\""), "one name twice");
  expect_refused(tensors("F32", "F64"), "tensor 'mean' has another type");
  expect_refused(tensors("[5, 21]", "[5, 20]"), "has another type, shape or place");
  expect_refused(tensors("[5, 21]", "[1099511627776, 1099511627776]"), "shape or place");
  expect_refused(tensors("[5, 21]", "[-5, 21]"), "no whole number");
  expect_refused(tensors("[5, 21]", "[5.0, 21]"), "not that of safetensors");
  expect_refused(tensors("[5, 21]", "[99999999999999999999, 21]"), "out of range");
  expect_refused(tensors("[5, 21]", "[[5], 21]"), "no whole number");
  expect_refused(tensors("[5, 21]", "[5]"), "other shapes");
  expect_refused(tensors("[5, 21]", "[1,1,1,1,1,1,1,1,105]"), "too many dimensions");
  expect_refused(tensors("\"data_offsets\":[0,", "\"data_offsets\":[4,"), "one after the other");
  expect_refused(tensors("\"data_offsets\":[0,", "\"data_offsets\":["), "without a place");
  expect_refused(tensors("\"shape\"", "\"form\""), "unknown properties");
  expect_refused(tensors("\"dtype\":\"F32\",", ""), "without a type");
  RandomGuard::Parts more = good;
  more.tensors += R"(,"more":{"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  expect_refused(more, "tensors that no guard has");

  RandomGuard::Parts longer = good;
  longer.data += "junk";
  expect_refused(longer, "one after the other");
  RandomGuard::Parts many = good;
  for (int i = 0; i < 60; ++i)
    many.tensors +=
        ",\"m" + std::to_string(i) + R"(":{"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  expect_refused(many, "too many tensors");

  RandomGuard bad = g;
  bad.mean[3] = std::nanf("");
  expect_refused(bad.parts(), "tensor 'mean' is not finite");
  bad = g;
  std::swap(bad.knots[0], bad.knots[5]);
  expect_refused(bad.parts(), "out of order");
  bad = g;
  std::swap(bad.exceeding[0], bad.exceeding[5]);
  expect_refused(bad.parts(), "out of order");
  bad = g;
  bad.samples = 0;
  expect_refused(bad.parts(), "no calibration samples");
  bad = g;
  bad.samples = std::numeric_limits<std::int64_t>::max();
  expect_refused(bad.parts(), "no calibration samples");
  bad = g;
  bad.samples += 1;
  expect_refused(bad.parts(), "out of order");
  bad = g;
  bad.exceeding.back() = -1;
  expect_refused(bad.parts(), "out of order");
  bad = g;
  bad.threshold = 1e9f;
  expect_refused(bad.parts(), "a threshold that is not that of the rate");
  bad = g;
  bad.inverse_spread[2] = 0;
  expect_refused(bad.parts(), "not positive");
}

TEST(GuardFiles, CutAtAnyByteAreRefused) {
  const std::string bytes = RandomGuard::join(RandomGuard(3, 4, 2, 3).parts());
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    std::string error;
    ASSERT_EQ(parse(bytes.substr(0, length), &error), nullptr) << length;
    ASSERT_FALSE(error.empty());
  }
}

TEST(GuardFiles, WithAnyByteChangedAreRefused) {
  const std::string bytes = RandomGuard::join(RandomGuard(3, 4, 2, 3).parts());
  const std::string head = "\"head\":\"f\\\"c\"", version = "\"created_with\":\"0.1.0\"";
  std::mt19937 engine(7);
  int accepted = 0;
  for (std::size_t at = 0; at < bytes.size(); ++at)
    for (const int flip : {1, 32, 128}) {
      std::string changed = bytes, error;
      changed[at] = static_cast<char>(changed[at] ^ flip);
      // Only texts that nothing here reads may differ, and blanks.
      accepted += parse(changed, &error) != nullptr;
    }
  EXPECT_LE(accepted, static_cast<int>(3 * (head.size() + version.size() + 12)));
}

// Whatever the header and the numbers, with a checksum that fits: the reader ends, reads nothing
// beyond the bytes, and what it accepts can be used.
TEST(GuardFiles, MadeToDeceiveAreReadOrRefused) {
  const RandomGuard::Parts good = RandomGuard(3, 4, 2, 3).parts();
  std::mt19937 engine(7);
  const std::vector<float> x(4, 0.5f), z(3, 0.25f);
  int accepted = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    RandomGuard::Parts parts = good;
    std::string* const part = trial % 3 == 0   ? &parts.metadata
                              : trial % 3 == 1 ? &parts.tensors
                                               : &parts.data;
    for (int edits = 1 + trial % 2; edits > 0; --edits)
      (*part)[engine() % part->size()] =
          trial % 5 ? static_cast<char>(engine()) : "{}[]\",:0189"[engine() % 11];
    std::string error;
    const auto file = parse(RandomGuard::join(parts), &error);
    ASSERT_EQ(file == nullptr, !error.empty());
    if (!file || file->table().latents != 4 || file->table().classes != 3) continue;
    ++accepted;
    float score, p_value;
    bool flagged;
    guard_score<float>(file->table(), {x.data(), 4, z.data(), 3, 1}, {&score, &p_value, &flagged},
                       serial_for);
    ASSERT_FALSE(std::isnan(score));
    ASSERT_TRUE(p_value > 0 && p_value <= 1);
  }
  EXPECT_GT(accepted, 100);  // other means and directions are as good as any
}

// ---- the C interface
// -----------------------------------------------------------------------------

class CInterface : public testing::Test {
 protected:
  RandomGuard random{5, 21, 6, 12};
  tacext_guard* guard = nullptr;
  char message[256] = "untouched";

  void SetUp() override {
    const std::string bytes = RandomGuard::join(random.parts());
    ASSERT_EQ(tacext_guard_parse(bytes.data(), bytes.size(), &guard, message, sizeof message),
              TACEXT_OK);
    EXPECT_STREQ(message, "");
  }
  void TearDown() override { tacext_guard_free(guard); }
};

TEST_F(CInterface, TellsOfTheGuard) {
  EXPECT_EQ(tacext_guard_classes(guard), 5);
  EXPECT_EQ(tacext_guard_latents(guard), 21);
  EXPECT_EQ(tacext_guard_samples(guard), 96);
  EXPECT_EQ(tacext_guard_false_positive_rate(guard), random.rate);
  const float* const norms = tacext_guard_head_norms(guard);
  EXPECT_EQ(std::vector<float>(norms, norms + 5), random.head_norms);
  EXPECT_EQ(tacext_guard_classes(nullptr), -1);
  EXPECT_EQ(tacext_guard_latents(nullptr), -1);
  EXPECT_EQ(tacext_guard_samples(nullptr), -1);
  EXPECT_TRUE(std::isnan(tacext_guard_threshold(nullptr)));
  EXPECT_TRUE(std::isnan(tacext_guard_false_positive_rate(nullptr)));
  EXPECT_EQ(tacext_guard_head_norms(nullptr), nullptr);
  EXPECT_EQ(tacext_guard_threshold(guard), random.threshold);
}

TEST_F(CInterface, GivesTheBitsOfCpp) {
  const std::int64_t count = 600;  // more than a block
  const auto x = test::as_elements<float>(test::normal_values(count * 25, 5));
  const auto z = test::as_elements<float>(test::normal_values(count * 7, 6));
  std::vector<float> score(count), p_value(count), expected(count), expected_p(count);
  std::vector<std::uint8_t> flagged(count);
  std::unique_ptr<bool[]> expected_flagged(new bool[count]);
  ASSERT_EQ(tacext_guard_score(guard, x.data(), 25, z.data(), 7, count, score.data(),
                               p_value.data(), flagged.data(), message, sizeof message),
            TACEXT_OK);
  guard_score<float>(random.table(), {x.data(), 25, z.data(), 7, count},
                     {expected.data(), expected_p.data(), expected_flagged.get()}, serial_for);
  EXPECT_EQ(score, expected);
  EXPECT_EQ(p_value, expected_p);
  for (std::int64_t i = 0; i < count; ++i) EXPECT_EQ(flagged[i], expected_flagged[i]);
  EXPECT_EQ(tacext_guard_score(guard, x.data(), 25, z.data(), 7, count, nullptr, nullptr, nullptr,
                               nullptr, 0),
            TACEXT_OK);
}

TEST_F(CInterface, NamesTheRowThatIsNotFiniteAndJudgesTheOthers) {
  const std::int64_t count = 300;
  auto x = test::as_elements<float>(test::normal_values(count * 21, 5));
  const auto z = test::as_elements<float>(test::normal_values(count * 5, 6));
  x[270 * 21 + 3] = std::nanf("");
  std::vector<float> score(count);
  std::vector<std::uint8_t> flagged(count);
  EXPECT_EQ(tacext_guard_score(guard, x.data(), 21, z.data(), 5, count, score.data(), nullptr,
                               flagged.data(), message, sizeof message),
            TACEXT_NOT_FINITE);
  EXPECT_NE(std::string(message).find("got NaN or infinity in row 270"), std::string::npos);
  EXPECT_EQ(flagged[270], 1);
  EXPECT_TRUE(std::isfinite(score[299]));
}

TEST_F(CInterface, RefusesWhatIsWrong) {
  const std::vector<float> x(42), z(10);
  const auto score = [&](const tacext_guard* g, const float* phi, std::int64_t phi_stride,
                         const float* logits, std::int64_t logits_stride, std::int64_t count) {
    return tacext_guard_score(g, phi, phi_stride, logits, logits_stride, count, nullptr, nullptr,
                              nullptr, message, sizeof message);
  };
  const auto expect = [&](tacext_status status, const char* text) {
    EXPECT_EQ(status, TACEXT_INVALID_ARGUMENT);
    EXPECT_NE(std::string(message).find(text), std::string::npos) << message;
  };
  expect(score(nullptr, x.data(), 21, z.data(), 5, 2), "tacext_guard_score: guard: expected");
  expect(score(guard, nullptr, 21, z.data(), 5, 2), "latent: expected a pointer, got null");
  expect(score(guard, x.data(), 21, nullptr, 5, 2), "logits: expected a pointer");
  expect(score(guard, x.data(), 20, z.data(), 5, 2), "latent_stride: expected");
  expect(score(guard, x.data(), 21, z.data(), 4, 2), "logits_stride: expected");
  expect(score(guard, x.data(), 21, z.data(), 5, 0), "count: expected 1 or more, got 0");
  expect(score(guard, x.data(), 21, z.data(), 5, -3), "count");
  tacext_guard* none = guard;
  EXPECT_EQ(tacext_guard_load("/no/such/file", &none, message, sizeof message), TACEXT_BAD_FILE);
  EXPECT_EQ(none, nullptr);
  EXPECT_NE(std::string(message).find("/no/such/file"), std::string::npos);
  EXPECT_EQ(tacext_guard_load("/", &none, message, sizeof message), TACEXT_BAD_FILE);
  const std::string pipe = testing::TempDir() + "tacext_guard_pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);  // whose reader would wait for ever
  EXPECT_EQ(tacext_guard_load(pipe.c_str(), &none, message, sizeof message), TACEXT_BAD_FILE);
  EXPECT_NE(std::string(message).find("no regular file"), std::string::npos);
  std::remove(pipe.c_str());
  EXPECT_EQ(tacext_guard_load(nullptr, &none, message, 10), TACEXT_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(message).size(), 9u);  // cut, and ended
  EXPECT_EQ(tacext_guard_parse("{}", 2, &none, nullptr, 0), TACEXT_BAD_FILE);
  tacext_guard_free(nullptr);
}

TEST_F(CInterface, ReadsAFileInAnyLocale) {
  const std::string path = testing::TempDir() + "tacext_guard_test.safetensors";
  std::ofstream(path, std::ios::binary) << RandomGuard::join(random.parts());
  tacext_guard* loaded = nullptr;
  const std::string before = std::setlocale(LC_ALL, nullptr);
  for (const char* locale : {"de_DE.UTF-8", "fr_FR.UTF-8"})  // where there are any
    if (std::setlocale(LC_ALL, locale) != nullptr) break;
  EXPECT_EQ(tacext_guard_load(path.c_str(), &loaded, message, sizeof message), TACEXT_OK)
      << message;
  std::setlocale(LC_ALL, before.c_str());
  EXPECT_EQ(tacext_guard_latents(loaded), 21);
  tacext_guard_free(loaded);
  std::remove(path.c_str());
}

TEST_F(CInterface, ServesManyCallersAtATime) {
  const std::int64_t count = 500;
  const auto x = test::as_elements<float>(test::normal_values(count * 21, 5));
  const auto z = test::as_elements<float>(test::normal_values(count * 5, 6));
  const auto judge = [&](std::vector<float>& score) {
    return tacext_guard_score(guard, x.data(), 21, z.data(), 5, count, score.data(), nullptr,
                              nullptr, nullptr, 0);
  };
  std::vector<float> expected(count);
  ASSERT_EQ(judge(expected), TACEXT_OK);
  std::vector<int> same(8, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < same.size(); ++t)
    threads.emplace_back([&, t] {
      for (int repeat = 0; repeat < 50; ++repeat) {
        std::vector<float> score(count);
        same[t] += judge(score) == TACEXT_OK && score == expected;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(same, std::vector<int>(8, 50));
}

TEST(CInterfaceSolver, SolvesAHead) {
  const test::TestHead head = test::random_head(6, 9, 50, 3);
  std::vector<double> s(6 * 9), norm(6), certificate(6);
  std::vector<std::int32_t> status(6);
  char message[256];
  ASSERT_EQ(tacext_minimal_perturbation(head.weight.data(), head.margins.data(), nullptr, 6, 9,
                                        s.data(), norm.data(), status.data(), certificate.data(),
                                        message, sizeof message),
            TACEXT_OK)
      << message;
  for (int k = 0; k < 6; ++k) {
    EXPECT_EQ(status[k], TACEXT_OPTIMAL);
    EXPECT_LE(certificate[k], 1e-9);
    double square = 0;
    for (int d = 0; d < 9; ++d) square += s[k * 9 + d] * s[k * 9 + d];
    EXPECT_NEAR(norm[k], std::sqrt(square), 1e-9 * norm[k]);
    for (int j = 0; j < 6; ++j) {
      double pushed = 0;
      for (int d = 0; d < 9; ++d) pushed += head.constraint(k, j, d) * s[k * 9 + d];
      if (j != k) {
        EXPECT_GE(pushed, head.margin(k, j) - 1e-7 * std::abs(head.margin(k, j)));
      }
    }
  }
  EXPECT_EQ(tacext_minimal_perturbation(head.weight.data(), head.margins.data(), nullptr, 6, 9,
                                        s.data(), nullptr, nullptr, nullptr, nullptr, 0),
            TACEXT_OK);
  std::vector<double> scale(9, 1.0);
  scale[4] = 0;
  EXPECT_EQ(tacext_minimal_perturbation(head.weight.data(), head.margins.data(), scale.data(), 6, 9,
                                        s.data(), nullptr, nullptr, nullptr, message, 256),
            TACEXT_INVALID_ARGUMENT);
  EXPECT_NE(std::string(message).find("scale: expected positive"), std::string::npos) << message;
  test::Values broken = head.weight;
  broken[17] = std::nan("");
  EXPECT_EQ(tacext_minimal_perturbation(broken.data(), head.margins.data(), nullptr, 6, 9, s.data(),
                                        nullptr, nullptr, nullptr, message, 256),
            TACEXT_NOT_FINITE);
  EXPECT_EQ(tacext_minimal_perturbation(broken.data(), head.margins.data(), nullptr, 1, 9, s.data(),
                                        nullptr, nullptr, nullptr, message, 256),
            TACEXT_INVALID_ARGUMENT);
}

TEST(CInterfaceSolver, TakesMarginsInBatchesAndWithStrides) {
  const std::int64_t samples = 1500, classes = 7, stride = 11;
  const auto logits = test::as_elements<float>(test::normal_values(samples * stride, 4));
  std::vector<float> wanted(classes * classes, -std::numeric_limits<float>::infinity());
  std::vector<float> margins = wanted;
  for (std::int64_t i = 0; i < samples; ++i)
    for (std::int64_t k = 0; k < classes; ++k)
      for (std::int64_t j = 0; j < classes; ++j)
        wanted[k * classes + j] =
            std::max(wanted[k * classes + j], logits[i * stride + j] - logits[i * stride + k]);
  char message[256];
  for (std::int64_t begin : {std::int64_t{0}, std::int64_t{1200}})
    ASSERT_EQ(tacext_pairwise_margin_max(logits.data() + begin * stride, stride,
                                         begin ? samples - begin : 1200, classes, margins.data(),
                                         message, sizeof message),
              TACEXT_OK)
        << message;
  EXPECT_EQ(margins, wanted);
  EXPECT_EQ(tacext_pairwise_margin_max(logits.data(), 3, 10, classes, margins.data(), message, 256),
            TACEXT_INVALID_ARGUMENT);
  EXPECT_STREQ(tacext_version(), TACEXT_VERSION_TEXT);
}

}  // namespace
}  // namespace tacext
