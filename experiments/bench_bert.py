"""bert.py beside BertForMaskedLM of the transformers package, with the same weights.

    make bench-bert                             all cases, about 4 minutes on 2 cores
    make bench-bert ARGS="--cases masked --rounds 30"

full      a training step: mask, forward, loss, backward, fused AdamW; 4 x 256, 128 tokens, batch
          16, 8192 words; theirs as it is used, with its head at every token and -100 where nothing
          is masked
masked    the same, but theirs, too, runs its head at the masked positions only

Both sides have the same weights and texts with the same words masked, and must agree on the loss
and on the gradient of the word embeddings before they are timed. Timed in turns; the ratio is the
median over rounds of theirs / ours (above 1: ours is faster), with the middle half in brackets.
"""
import torch
import torch.nn.functional as F

from pairs import DEVICE, agree, bench, pair, training           # first: it finds the scripts
import bert

CASES = ["full", "masked"]
NEEDS = dict.fromkeys(CASES, ["transformers.BertForMaskedLM"])
VOCAB, T, B, DIM, DEPTH, HEADS = 8192, 128, 16, 256, 4, 4

RENAMED = [("token_embed", "embeddings.word_embeddings"),
           ("pos_embed", "embeddings.position_embeddings"),
           ("segment_embed", "embeddings.token_type_embeddings"), ("blocks.", "encoder.layer."),
           ("attn.proj", "attention.output.dense"), ("attn.", "attention.self."),
           ("norm1", "attention.output.LayerNorm"), ("mlp.fc1", "intermediate.dense"),
           ("mlp.fc2", "output.dense"), ("norm2", "output.LayerNorm"),
           ("mlm_norm", "cls.predictions.transform.LayerNorm"),
           ("mlm_bias", "cls.predictions.bias"),
           ("mlm_transform", "cls.predictions.transform.dense")]


def peer(ours):
    """BertForMaskedLM with our weights: renamed."""
    import transformers
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        intermediate_size=4 * DIM, hidden_dropout_prob=0., attention_probs_dropout_prob=0.,
        max_position_embeddings=T, pad_token_id=0)
    theirs, state = transformers.BertForMaskedLM(config), {}
    for name, value in ours.state_dict().items():
        for a, b in RENAMED:
            name = name.replace(a, b)
        name = f"embeddings.LayerNorm{name[4:]}" if name.startswith("norm.") else name
        if not name.startswith("pooler"):
            state[name if name.startswith("cls.") else f"bert.{name}"] = value
    wrong, decoder = theirs.load_state_dict(state, strict=False), "cls.predictions.decoder"
    assert set(wrong.missing_keys) <= {f"{decoder}.weight", f"{decoder}.bias"} \
        and not wrong.unexpected_keys, wrong                                  # these two are tied
    return theirs.to(DEVICE).train()


def sides(case, dtype):
    """A training step of ours and of theirs."""
    torch.manual_seed(0)
    ours = bert.BERT(VOCAB, T, DIM, DEPTH, HEADS).to(DEVICE)
    theirs = peer(ours)
    x = bert.add_special_tokens(torch.randint(bert.FIRST_WORD, VOCAB, (B, T - 2), device=DEVICE))
    single = torch.arange(T, device=DEVICE).expand_as(x)

    def our_loss():
        inputs, target = bert.mask(x, single, VOCAB)
        return bert.distance(ours(*inputs), target)

    def their_loss():
        (tokens, positions), target = bert.mask(x, single, VOCAB)
        if case == "full":
            labels = torch.full_like(x, -100).scatter(1, positions, target)
            return theirs(tokens, labels=labels).loss
        masked = bert.gather(theirs.bert(tokens).last_hidden_state, positions)
        return F.cross_entropy(theirs.cls(masked).flatten(0, 1).float(), target.flatten())

    found, embed = [], theirs.bert.embeddings.word_embeddings
    for loss, table in (our_loss, ours.token_embed.weight), (their_loss, embed.weight):
        torch.manual_seed(1)
        value = loss()
        found.append((value.detach(), torch.autograd.grad(value, table)[0]))
    for what, a, b in zip(("the loss", "its gradient"), *found):
        agree(what, a, b, 1e-4)
    return training(our_loss, ours, dtype), training(their_loss, theirs, dtype, ours=False)


def measure(case, dtype, rounds):
    """The figures of a case."""
    return [dict(case="step, 4 x 256, 128 tokens, batch 16, 8192 words",
                 beside="BertForMaskedLM" + ", masked head" * (case == "masked"),
                 **pair(*sides(case, dtype), rounds))]


if __name__ == "__main__":
    bench(__doc__, CASES, measure, NEEDS)
