"""bert.py beside BertForMaskedLM of the transformers package, with the same weights.

    make bench-bert                             all cases, about 4 minutes on 2 cores
    make bench-bert ARGS="--cases masked --rounds 30"

full      a training step: mask, forward, loss, backward, fused AdamW; 4 x 256, 128 tokens, batch 16, 8192 words;
          theirs as it is used, with its head at every token and -100 where nothing is hidden
masked    the same, but theirs, too, runs its head at the masked places only

Both sides hold the same weights, get the same texts with the same words hidden, and must agree on the loss
and on the gradient of the word embeddings before the clock starts. `--plain` leaves out the faster kernels
that common.autocast chooses on some CPUs. Timed in turns; the ratio is the median over rounds of theirs /
ours (above 1: ours is faster), the middle half in brackets.
"""
import torch
import torch.nn.functional as F
import transformers

from pairs import DEVICE, agree, bench, pair, training           # first: it knows where bert.py is
import bert

VOCAB, T, B, DIM, DEPTH, HEADS = 8192, 128, 16, 256, 4, 4


def peer(ours):
    """BertForMaskedLM with our weights: renamed."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * DIM,
        hidden_dropout_prob=0., attention_probs_dropout_prob=0., max_position_embeddings=T, pad_token_id=0)
    theirs, state = transformers.BertForMaskedLM(config), {}
    for name, value in ours.state_dict().items():
        for a, b in [("token_embed", "embeddings.word_embeddings"), ("pos_embed", "embeddings.position_embeddings"),
                     ("segment_embed", "embeddings.token_type_embeddings"), ("blocks.", "encoder.layer."),
                     ("attn.proj", "attention.output.dense"), ("attn.", "attention.self."),
                     ("norm1", "attention.output.LayerNorm"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
                     ("norm2", "output.LayerNorm"), ("head_norm", "cls.predictions.transform.LayerNorm"),
                     ("head_bias", "cls.predictions.bias"), ("head.", "cls.predictions.transform.dense.")]:
            name = name.replace(a, b)
        name = f"embeddings.LayerNorm{name[4:]}" if name.startswith("norm.") else name
        if not name.startswith("pooler"):
            state[name if name.startswith("cls.") else f"bert.{name}"] = value
    missing = theirs.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} \
        and not missing.unexpected_keys, missing                                    # these two are tied
    return theirs.to(DEVICE).train()


def sides(case, dtype, plain):
    """A training step of ours and of theirs."""
    torch.manual_seed(0)
    ours = bert.BERT(VOCAB, T, DIM, DEPTH, HEADS).to(DEVICE)
    theirs = peer(ours)
    x = bert.wrap(torch.randint(5, VOCAB, (B, T - 2), device=DEVICE))
    alone = torch.arange(T, device=DEVICE).expand_as(x)

    def our_loss():
        masked, target = bert.mask(x, alone, VOCAB)
        return bert.distance(ours(masked), target)

    def their_loss():
        (tokens, places), target = bert.mask(x, alone, VOCAB)
        if case == "full":
            labels = torch.full_like(x, -100).scatter(1, places, target)
            return theirs(tokens, labels=labels).loss
        hidden = theirs.bert(tokens).last_hidden_state
        return F.cross_entropy(theirs.cls(bert.take(hidden, places)).flatten(0, 1).float(), target.flatten())

    found = []
    for loss, table in (our_loss, ours.token_embed.weight), (their_loss, theirs.bert.embeddings.word_embeddings.weight):
        torch.manual_seed(1)
        value = loss()
        found.append((value.detach(), torch.autograd.grad(value, table)[0]))
    for what, a, b in zip(("the loss", "its gradient"), *found):
        agree(what, a, b, 1e-4)
    return training(our_loss, ours, dtype, plain), training(their_loss, theirs, dtype, True)


def measure(case, dtype, plain, rounds):
    """The figures of a case."""
    other = "BertForMaskedLM" + ", masked head" * (case == "masked")
    return [dict(case="step, 4 x 256, 128 tokens, batch 16, 8192 words", beside=other, **pair(*sides(case, dtype, plain), rounds))]


if __name__ == "__main__":
    bench(__doc__, ["full", "masked"], measure, "transformers")
