//! Prompts and answers in tokens: whole conversations, one BOS, one EOS. The expected ids are worked out by hand from
//! a vocabulary small enough to see.

use sapo_flow_training::text::{ChatTemplate, Message, Rendered, SpecialTokens, TextTokenizer, encode_conversation};
use serde_json::{Value, json};

const BOS: u32 = 0;
const EOS: u32 = 1;
const TURN_END: u32 = 2;
const USER: u32 = 3;
const ASSISTANT: u32 = 4;
const A: u32 = 5;
const B: u32 = 6;
const SPACE: u32 = 7;
const SPACE_A: u32 = 8;
const NEW_LINE: u32 = 9;
const AB: u32 = 10;

/// Byte-level BPE with the merges "Ġ a" and "a b", whose post-processor puts `<s>` in front where `adds_bos` is set.
fn tokenizer(adds_bos: bool, configs: &[(&str, Value)]) -> TextTokenizer {
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let with_bos = json!({"type": "Sequence", "processors": [byte_level, {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }]});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>"), special(TURN_END, "<end>"),
                         special(USER, "<user>"), special(ASSISTANT, "<assistant>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": if adds_bos { with_bos } else { byte_level.clone() },
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": {"<s>": BOS, "</s>": EOS, "<end>": TURN_END, "<user>": USER, "<assistant>": ASSISTANT,
                            "a": A, "b": B, "Ġ": SPACE, "Ġa": SPACE_A, "Ċ": NEW_LINE, "ab": AB},
                  "merges": [["Ġ", "a"], ["a", "b"]]},
    });
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, value: &Value| {
        std::fs::write(dir.path().join(name), value.to_string()).expect("the file is written");
    };
    write("tokenizer.json", &file);
    write("tokenizer_config.json", &json!({"bos_token": "<s>", "eos_token": "</s>"}));
    configs.iter().for_each(|(name, value)| write(name, value));
    TextTokenizer::load(dir.path()).expect("the tokenizer loads")
}

/// A second end token, as chat models have one for turns and one for texts.
fn chat_tokenizer(adds_bos: bool) -> TextTokenizer {
    tokenizer(adds_bos, &[("generation_config.json", json!({"eos_token_id": [EOS, TURN_END]}))])
}

fn template(source: &str) -> ChatTemplate {
    let special_tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let special_tokens = special_tokens.map(|(role, text)| (role.to_owned(), text.to_owned()));
    ChatTemplate::from_source(source, SpecialTokens(special_tokens.into())).expect("the template compiles")
}

const TURNS: &str = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>\n' }}{% endfor %}\
                     {% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}";

fn turns(contents: &[&str]) -> Vec<Message> {
    let roles = ["user", "assistant"].into_iter().cycle();
    contents.iter().zip(roles).map(|(&content, role)| Message::new(role, content)).collect()
}

fn error_of(tokenizer: &TextTokenizer, template: &ChatTemplate, messages: &[Message]) -> String {
    encode_conversation(tokenizer, template, messages).expect_err("the conversation is unusable").to_string()
}

#[test]
fn several_turns_are_cut_at_the_last_answer() {
    for adds_bos in [false, true] {
        let tokenizer = chat_tokenizer(adds_bos);
        let encoded = encode_conversation(&tokenizer, &template(TURNS), &turns(&["a", "b", " a", "ab"]));
        let encoded = encoded.expect("the conversation is encoded");
        let prompt = [USER, A, TURN_END, NEW_LINE, ASSISTANT, B, TURN_END, NEW_LINE, USER, SPACE_A, TURN_END, NEW_LINE];
        let bos = if adds_bos { &[BOS][..] } else { &[] };
        assert_eq!(encoded.prompt_ids, [bos, &prompt, &[ASSISTANT]].concat());
        // The line break that the template writes after the turn's end is cut.
        assert_eq!(encoded.answer_ids, [AB, TURN_END]);
    }
}

#[test]
fn bos_is_there_once_whoever_writes_it() {
    let messages = turns(&["a", "b"]);
    for source in ["{{ bos_token }}", "{{ bos_token }}{{ bos_token }}", ""] {
        let template = template(&format!("{source}{TURNS}"));
        let encoded = encode_conversation(&chat_tokenizer(true), &template, &messages).expect("it is encoded");
        assert_eq!(encoded.prompt_ids, [BOS, USER, A, TURN_END, NEW_LINE, ASSISTANT], "{source:?}");
    }
    // A tokenizer's configuration can turn its post-processor's BOS off, or on.
    for (adds_bos, configured) in [(true, false), (false, true)] {
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": configured});
        let tokenizer = tokenizer(adds_bos, &[("tokenizer_config.json", config)]);
        let encoded = Rendered::plain("a", "b").encode(&tokenizer).expect("it is encoded");
        assert_eq!(encoded.prompt_ids, if configured { vec![BOS, A] } else { vec![A] });
    }
}

#[test]
fn eos_is_there_once_whoever_writes_it() {
    // TURN_END ends an answer only where the model's configuration says so.
    for (tokenizer, end) in
        [(chat_tokenizer(true), &[TURN_END][..]), (tokenizer(true, &[]), &[TURN_END, NEW_LINE, EOS])]
    {
        let encoded = encode_conversation(&tokenizer, &template(TURNS), &turns(&["a", "b"])).expect("it is encoded");
        assert_eq!(encoded.answer_ids, [&[B], end].concat());
    }
    for answer in ["b", "b</s>", "b</s></s>", "b</s>\n"] {
        let encoded = Rendered::plain("a", answer).encode(&chat_tokenizer(true)).expect("it is encoded");
        assert_eq!((encoded.prompt_ids, encoded.answer_ids), (vec![BOS, A], vec![B, EOS]), "{answer:?}");
    }
    // An id in config.json serves a tokenizer that names no EOS.
    let configs = [("tokenizer_config.json", json!({})), ("config.json", json!({"eos_token_id": TURN_END}))];
    let encoded = Rendered::plain("a", "b").encode(&tokenizer(false, &configs)).expect("it is encoded");
    assert_eq!(encoded.answer_ids, [B, TURN_END]);
}

#[test]
fn a_token_across_the_cut_has_both_parts_tokenized_apart() {
    let tokenizer = chat_tokenizer(true);
    // "a a" is a, Ġa: the second token would belong to both.
    let encoded = Rendered::plain("a ", "a").encode(&tokenizer).expect("it is encoded");
    assert_eq!((encoded.prompt_ids, encoded.answer_ids), (vec![BOS, A, SPACE], vec![A, EOS]));
    // A space that leads the answer stays its own.
    let encoded = Rendered::plain("a", " a").encode(&tokenizer).expect("it is encoded");
    assert_eq!((encoded.prompt_ids, encoded.answer_ids), (vec![BOS, A], vec![SPACE_A, EOS]));
}

#[test]
fn two_answers_share_their_prompt() {
    let tokenizer = chat_tokenizer(true);
    let pair = |chosen: &str, rejected: &str| {
        Rendered::encode_pair(&Rendered::plain("b a", chosen), &Rendered::plain("b a", rejected), &tokenizer)
    };
    let encoded = pair("b", " a").expect("it is encoded");
    assert_eq!(encoded.prompt_ids, [BOS, B, SPACE_A]);
    assert_eq!((encoded.chosen_ids, encoded.rejected_ids), (vec![B, EOS], vec![SPACE_A, EOS]));
    let message = pair("b", " ").expect_err("there is no rejected answer").to_string();
    assert_eq!(message, "rejected: the answer is empty");
    let other = Rendered::encode_pair(&Rendered::plain("a", "b"), &Rendered::plain("b", "b"), &tokenizer);
    assert!(other.expect_err("the prompts differ").to_string().contains("different prompts"));
}

#[test]
fn unusable_conversations_say_why() {
    let tokenizer = chat_tokenizer(false);
    let turn_template = template(TURNS);
    for (contents, expected) in [
        (&["a", ""][..], "the answer is empty"),
        (&["a", " \n"], "the answer is empty"),
        (&["a", "<end>"], "the answer is empty"),
        (&["a", "b<end>b"], "the answer contains the end token <end> before its end"),
        (&["a"], "the last message must be the assistant's, found the role \"user\""),
        (&[], "the conversation has no messages"),
    ] {
        assert_eq!(error_of(&tokenizer, &turn_template, &turns(contents)), expected);
    }
    // A template that leaves the answer out leaves nothing to learn.
    let silent = template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}");
    assert_eq!(error_of(&tokenizer, &silent, &turns(&["a", "b"])), "chat template: it renders nothing of the answer");
    let strict = template("{{ raise_exception('roles must alternate') }}");
    assert_eq!(error_of(&tokenizer, &strict, &turns(&["a", "b"])), "chat template: roles must alternate");
    let endless = template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}");
    let expected = "chat template: it does not end within 20000000 instructions";
    assert_eq!(error_of(&tokenizer, &endless, &turns(&["a", "b"])), expected);
    let fickle = template("{{ messages | length }}{{ messages[0].content }}");
    let message = error_of(&tokenizer, &fickle, &turns(&["a", "b"]));
    assert!(message.contains("the prompt goes on with \"1a\", the conversation with \"2a\""), "{message}");
    let message = Rendered::plain("", "b").encode(&tokenizer).expect_err("there is no prompt").to_string();
    assert!(message.contains("the prompt is empty"), "{message}");
}

#[test]
fn special_tokens_are_found_and_left_out_on_request() {
    let tokenizer = chat_tokenizer(true);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()), (Some(BOS), Some(EOS), None));
    assert_eq!((tokenizer.eos_ids(), tokenizer.leading_ids()), (&[EOS, TURN_END][..], &[BOS][..]));
    let ids = tokenizer.encode("<user>a<end>").expect("the text is tokenized");
    assert_eq!(ids, [USER, A, TURN_END]);
    assert_eq!(tokenizer.decode(&ids).expect("the ids are decoded"), "<user>a<end>");
    assert_eq!(tokenizer.decode_without_special_tokens(&ids).expect("the ids are decoded"), "a");
}
