// Text to ids by Hugging Face's tokenizers.js, and conversations by its Jinja.

/** What of a tokenizer and its chat template the model needs. */
export class TextCodec {
  /**
   * @param {object} facts `tokenizer` and `chat` of model.json.
   * @param {object} json The content of tokenizer.json.
   * @param {string[]} tokenBytes The bytes of each token, by id.
   * @param {Function} Tokenizer The class of `@huggingface/tokenizers`.
   * @param {Function | null} Template The class of `@huggingface/jinja`.
   */
  constructor(facts, json, tokenBytes, Tokenizer, Template) {
    this.facts = facts.tokenizer;
    this.tokenBytes = tokenBytes;
    this.tokenizer = new Tokenizer(json, {});
    this.chat = facts.chat;
    this.template = facts.chat && new Template(facts.chat.template);
    const { text, ids } = this.facts.probe;
    if (String(this.encode(text)) !== String(ids))
      throw new Error(
        "The tokenizer expects to give a known text the ids that it has in Python. " +
        "Received: others. tokenizer.json was changed, or tokenizers.js reads it " +
        "otherwise: make the folder again with gpt-tf web.");
  }

  /** The ids of a text; special tokens in it are recognised. */
  encode(text) {
    const { ids } = this.tokenizer.encode(text, { add_special_tokens: false });
    if (ids.some((id) => id === undefined || this.tokenBytes[id] === undefined))
      throw new RangeError("The text has characters that the model's vocabulary lacks.");
    return ids;
  }

  /** The text of one token, as it may be shown by itself. */
  textOf(id) {
    const name = this.tokenizer.id_to_token(id) ?? "";
    const bytes = this.tokenBytes[id];
    return bytes
      ? new TextDecoder().decode(Uint8Array.from(bytes, (c) => c.charCodeAt(0)))
      : name;
  }

  /** Write a conversation as a prompt that leaves room for the answer.
   *
   * The oldest turns are left out where all of it is too long, as by
   * gpt_tf/generation/conversation.py.
   *
   * @returns {{ids: number[], maxNewTokens: number, stop: string[], notices: string[]}}
   */
  conversation(messages, { contextLength, maxNewTokens, stop }) {
    if (!this.template)
      throw new Error("A chat expects a model with a chat template. Received: one without.");
    const first = messages.findIndex((message) => message.role !== "system");
    const system = messages.slice(0, Math.max(first, 0));
    let turns = messages.slice(Math.max(first, 0));
    const room = contextLength - Math.min(maxNewTokens, Math.floor(contextLength / 2));
    let ids;
    for (;;) {
      ids = this.encode(this.#render([...system, ...turns]));
      const next = turns.findIndex((turn, place) => place && turn.role === "user");
      if (ids.length <= room || next < 0) break;
      turns = turns.slice(next);
    }
    if (ids.length >= contextLength)
      throw new RangeError(
        `The last turn expects room in the context of ${contextLength} tokens. ` +
        `Received: ${ids.length}. Make the message shorter, or the system prompt.`);
    const isCut = system.length + turns.length < messages.length;
    return {
      ids,
      maxNewTokens: Math.min(maxNewTokens, contextLength - ids.length),
      stop: [...stop, ...this.chat.stop],
      notices: isCut
        ? [`The conversation is longer than the context of ${contextLength} tokens; ` +
           "its oldest turns are left out."]
        : [],
    };
  }

  #render(messages) {
    const values = { tools: null, documents: null, ...this.chat.special_tokens };
    return this.template.render({ ...values, messages, add_generation_prompt: true });
  }
}
