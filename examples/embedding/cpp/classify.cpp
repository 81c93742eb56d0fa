// Classify texts in C++ with ONNX Runtime's C API: no Python, no model server.
//
//   classify BUNDLE [onnx/model_quantized.onnx] < texts.txt
//
// Answers each line of standard input with its label, a tab and the label's probability. It reads WordPiece
// tokenizers (BERT, DistilBERT, MiniLM, MPNet, ELECTRA); ICU gives it the Unicode rules that theirs follow. A
// special token that is spelt out in a text, such as "[SEP]", is read as plain text.
#include <onnxruntime_c_api.h>
#include <unicode/locid.h>
#include <unicode/normalizer2.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using nlohmann::json;

static json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read; name a folder that `distill export` wrote");
  return json::parse(file);
}

// The normalizer, pre-tokenizer and WordPiece model of tokenizer.json.
class Tokenizer {
 public:
  Tokenizer(const std::string& bundle, size_t max_length) : max_length_(max_length) {
    const json file = read_json(bundle + "/tokenizer.json");
    const json& model = file.at("model");
    if (model.value("type", "") != "WordPiece" || file.at("normalizer").value("type", "") != "BertNormalizer")
      throw std::runtime_error(bundle + "/tokenizer.json: only WordPiece with BERT's normalizer is read here");
    for (const auto& [piece, id] : model.at("vocab").items()) vocabulary_[piece] = id.get<int64_t>();
    prefix_ = model.at("continuing_subword_prefix");
    longest_word_ = model.at("max_input_chars_per_word");
    const json& normalizer = file.at("normalizer");
    lowercase_ = normalizer.at("lowercase");
    // Left open, it goes with lower case.
    if (!normalizer.at("clean_text") || !normalizer.at("handle_chinese_chars"))
      throw std::runtime_error(bundle + "/tokenizer.json: a normalizer that keeps control characters is not read here");
    strip_accents_ = normalizer.at("strip_accents").is_null() ? lowercase_ : normalizer.at("strip_accents").get<bool>();
    const json settings = read_json(bundle + "/tokenizer_config.json");
    first_ = id_of(settings, "cls_token");
    last_ = id_of(settings, "sep_token");
    unknown_ = id_of(settings, "unk_token");
  }

  std::vector<int64_t> encode(const std::string& text) const {
    std::vector<int64_t> ids{first_};
    for (const auto& word : words(text)) append_pieces(word, ids);
    if (ids.size() > max_length_ - 1) ids.resize(max_length_ - 1);
    ids.push_back(last_);
    return ids;
  }

 private:
  int64_t id_of(const json& settings, const char* name) const {
    const json& token = settings.at(name);
    return vocabulary_.at(token.is_string() ? token.get<std::string>() : token.at("content").get<std::string>());
  }

  static bool is_chinese(UChar32 c) {
    return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) ||
           (c >= 0x2A700 && c <= 0x2B73F) || (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
           (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
  }

  static bool is_punctuation(UChar32 c) {
    if (c < 128) return std::ispunct(static_cast<unsigned char>(c)) != 0;
    return (U_GET_GC_MASK(c) & U_GC_P_MASK) != 0;
  }

  static bool is_control(UChar32 c) {
    if (c == '\t' || c == '\n' || c == '\r') return false;
    return (U_GET_GC_MASK(c) & (U_GC_CC_MASK | U_GC_CF_MASK | U_GC_CN_MASK | U_GC_CO_MASK)) != 0;
  }

  // Words and single punctuation marks, cleaned.
  std::vector<icu::UnicodeString> words(const std::string& text) const {
    icu::UnicodeString clean;
    const icu::UnicodeString given = icu::UnicodeString::fromUTF8(text);
    for (int32_t i = 0; i < given.length(); i = given.moveIndex32(i, 1)) {
      const UChar32 c = given.char32At(i);
      if (c == 0 || c == 0xFFFD || is_control(c)) continue;
      if (is_chinese(c)) clean.append(u' ').append(c).append(u' ');
      else clean.append(u_isUWhiteSpace(c) ? static_cast<UChar32>(' ') : c);
    }
    if (strip_accents_) {
      UErrorCode status = U_ZERO_ERROR;
      const icu::UnicodeString decomposed = icu::Normalizer2::getNFDInstance(status)->normalize(clean, status);
      clean.remove();
      for (int32_t i = 0; i < decomposed.length(); i = decomposed.moveIndex32(i, 1)) {
        const UChar32 c = decomposed.char32At(i);
        if (u_charType(c) != U_NON_SPACING_MARK) clean.append(c);
      }
    }
    if (lowercase_) {
      // Each character by itself, as BERT's normalizer does it: no final sigma.
      const icu::UnicodeString cased = clean;
      clean.remove();
      for (int32_t i = 0; i < cased.length(); i = cased.moveIndex32(i, 1))
        clean.append(icu::UnicodeString(cased.char32At(i)).toLower(icu::Locale::getRoot()));
    }
    std::vector<icu::UnicodeString> found;
    icu::UnicodeString word;
    const auto finish = [&] {
      if (!word.isEmpty()) found.push_back(word);
      word.remove();
    };
    for (int32_t i = 0; i < clean.length(); i = clean.moveIndex32(i, 1)) {
      const UChar32 c = clean.char32At(i);
      if (c == ' ') finish();
      else if (is_punctuation(c)) { finish(); found.push_back(icu::UnicodeString(c)); }
      else word.append(c);
    }
    finish();
    return found;
  }

  // The longest pieces from the left; the whole word is unknown if one is missing.
  void append_pieces(const icu::UnicodeString& word, std::vector<int64_t>& ids) const {
    const size_t before = ids.size();
    if (word.countChar32() > longest_word_) { ids.push_back(unknown_); return; }
    for (int32_t start = 0; start < word.length();) {
      int32_t end = word.length();
      for (; end > start; end = word.moveIndex32(end, -1)) {
        std::string piece = start ? prefix_ : "";
        word.tempSubStringBetween(start, end).toUTF8String(piece);
        const auto entry = vocabulary_.find(piece);
        if (entry == vocabulary_.end()) continue;
        ids.push_back(entry->second);
        break;
      }
      if (end == start) { ids.resize(before); ids.push_back(unknown_); return; }
      start = end;
    }
  }

  std::unordered_map<std::string, int64_t> vocabulary_;
  std::string prefix_;
  size_t max_length_;
  int32_t longest_word_;
  bool lowercase_, strip_accents_;
  int64_t first_, last_, unknown_;
};

// One ONNX Runtime session.
class Model {
 public:
  explicit Model(const std::string& path) : api_(OrtGetApiBase()->GetApi(ORT_API_VERSION)) {
    if (!api_) throw std::runtime_error("this ONNX Runtime is older than its header");
    check(api_->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "distill", &env_));
    check(api_->CreateSessionOptions(&options_));
    check(api_->SetIntraOpNumThreads(options_, 1));
    check(api_->CreateSession(env_, path.c_str(), options_, &session_));
    check(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
    OrtAllocator* allocator;
    check(api_->GetAllocatorWithDefaultOptions(&allocator));
    size_t count;
    check(api_->SessionGetInputCount(session_, &count));
    for (size_t i = 0; i < count; ++i) {
      char* name;
      check(api_->SessionGetInputName(session_, i, allocator, &name));
      inputs_.emplace_back(name);
      check(api_->AllocatorFree(allocator, name));
    }
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  ~Model() {
    api_->ReleaseMemoryInfo(memory_);
    api_->ReleaseSession(session_);
    api_->ReleaseSessionOptions(options_);
    api_->ReleaseEnv(env_);
  }

  std::vector<float> logits(std::vector<int64_t> ids, size_t classes) const {
    std::vector<int64_t> mask(ids.size(), 1), types(ids.size(), 0);
    const int64_t shape[] = {1, static_cast<int64_t>(ids.size())};
    std::vector<const char*> names;
    std::vector<OrtValue*> values;
    for (const auto& name : inputs_) {
      auto& data = name == "input_ids" ? ids : name == "attention_mask" ? mask : types;
      OrtValue* value = nullptr;
      check(api_->CreateTensorWithDataAsOrtValue(memory_, data.data(), data.size() * sizeof(int64_t), shape, 2,
                                                 ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value));
      names.push_back(name.c_str());
      values.push_back(value);
    }
    const char* output_name = "logits";
    OrtValue* output = nullptr;
    check(api_->Run(session_, nullptr, names.data(), values.data(), values.size(), &output_name, 1, &output));
    float* data;
    check(api_->GetTensorMutableData(output, reinterpret_cast<void**>(&data)));
    std::vector<float> found(data, data + classes);
    for (OrtValue* value : values) api_->ReleaseValue(value);
    api_->ReleaseValue(output);
    return found;
  }

 private:
  void check(OrtStatus* status) const {
    if (!status) return;
    const std::string message = api_->GetErrorMessage(status);
    api_->ReleaseStatus(status);
    throw std::runtime_error(message);
  }

  const OrtApi* api_;
  OrtEnv* env_ = nullptr;
  OrtSessionOptions* options_ = nullptr;
  OrtSession* session_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
  std::vector<std::string> inputs_;
};

int main(int count, char** arguments) try {
  if (count < 2) throw std::runtime_error("usage: classify BUNDLE [FILE] < texts.txt");
  const std::string bundle = arguments[1];
  const json manifest = read_json(bundle + "/distill.json");
  if (manifest.value("problem_type", "") == "multi_label_classification")
    throw std::runtime_error(bundle + ": its texts have several labels each; this program gives one");
  const json columns = manifest.value("data", json::object()).value("columns", json::object());
  if (columns.contains("text_pair") && !columns["text_pair"].is_null())
    throw std::runtime_error(bundle + ": was trained on pairs of texts; this program gives single ones");
  if (manifest.value("long_texts", "head") != "head")
    throw std::runtime_error(bundle + ": reads more of a long text than its beginning; this program does not");
  const json& details = manifest.at("details");
  const std::string file = count > 2 ? arguments[2] : details.at("files").at("cpu").get<std::string>();
  const std::vector<std::string> labels = manifest.at("labels");
  const double temperature = details.at("temperature").value(file, 1.0);
  const Tokenizer tokenizer(bundle, manifest.at("max_length"));
  const Model model(bundle + "/" + file);
  for (std::string text; std::getline(std::cin, text);) {
    if (!text.empty() && text.back() == '\r') text.pop_back();
    const std::vector<float> logits = model.logits(tokenizer.encode(text), labels.size());
    const auto best = std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp((logit - *best) / temperature);
    std::cout << labels[best - logits.begin()] << '\t' << 1 / sum << '\n';
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
