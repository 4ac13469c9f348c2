"""The model and the method of each script can be pasted elsewhere: they run with torch alone."""
import ast
import math
import re
import textwrap

import pytest
import torch
from conftest import ROOT

SECTIONS = ["settings", "the model", "the method", "evaluation", "main"]     # others may stand before evaluation
ALLOWED = {"torch", "numpy", "common", "contextlib", "copy", "dataclasses", "functools", "itertools", "json", "math", "pathlib",
           "random", "re", "time", "typing"}
PATCHES = r"setattr\(F|torch\.ops\.mkldnn|_linear_pointwise"                  # of torch: what runs is what is written
TRIALS = {   # a training step with what was pasted: it must give a finite loss and gradients
    "simclr.py": """
        model = SimCLR(depth=10, width=8, dim=8)
        x = torch.rand(4, 3, 16, 16)
        z1, z2 = model(augment(x) - .5), model(augment(x) - .5)
        loss = ntxent(z1, z2, temperature=.5) + triplet(z1, z2, margin=.5)
    """,
    "autoencoder.py": """
        models = nn.ModuleList(Autoencoder(image_size=16, width=4, latent=6, bottleneck=bottleneck, k=5)
                               for bottleneck in ("none", "narrow", "variational", "sparse", "weak"))
        inputs, target = mask(torch.randn(2, 3, 16, 16), corrupt=.3)
        loss = sum(distance(prediction, target, kl, beta=.1) for prediction, kl in (model(inputs) for model in models))
        assert interpolate(models[1], target[:1], target[1:], 5).shape == (1, 5, 3, 16, 16)
        model = models
    """,
    "mae.py": """
        model = MAE(image_size=8, patch=2, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)
        inputs, target = mask(torch.randn(2, 3, 8, 8), patch=2, ratio=.75)
        loss = distance(model(*inputs), target)
        inputs, target = mask(torch.randn(2, 3, 8, 8), patch=2, ratio=.75, norm_pix=True)
        loss = loss + distance(model(*inputs), target)
        assert unpatchify(patchify(torch.ones(1, 3, 8, 8), 2), 2).shape == (1, 3, 8, 8)
    """,
    "bert.py": """
        model = BERT(vocab=50, context=26, dim=16, depth=2, heads=2)
        x, loss = torch.randint(5, 50, (3, 24)), 0.
        for span_ids in torch.arange(24).expand_as(x), spans(3, 24), pmi_spans(x.flatten()).view_as(x):
            inputs, target = mask(add_special_tokens(x), F.pad(span_ids, (1, 1), value=-1), vocab=50)
            loss = loss + distance(model(*inputs), target)
        segments = (torch.arange(24) > 9).long().expand_as(x)
        loss = loss + model.pool(x, segments=segments).square().mean()
        loss = loss + F.cross_entropy(nn.Sequential(Pooled(model), nn.Linear(16, 3))(add_special_tokens(x)), torch.arange(3))
    """,
    "gpt.py": """
        model = GPT(vocab=50, context=12, dim=16, depth=2, heads=2)
        inputs, target = mask(torch.randint(49, (3, 12)), bos=49)
        loss = distance(model(inputs), target)
        assert sample(model.eval(), torch.full((2, 1), 49), 5, temperature=.8, top_k=9, top_p=.9).shape == (2, 5)
        assert len(sample_text(model, torch.tensor([1, 2]), 20, bos=49)) == 20
    """,
    "lora.py": """
        inputs, target = mask(torch.randint(49, (3, 12)), bos=49)
        models = [adapt(GPT(vocab=50, context=12, dim=16, depth=2, heads=2), method, ["qkv", "fc2"], rank=2)
                  for method in ("lora", "ia3", "bitfit", "first", "middle", "last", "full")]
        loss = sum(distance(model(inputs), target) for model in models)
        x = in_context(torch.randint(49, (2, 3)), torch.tensor([[1, 2]]))
        assert x.shape == (1, 8) and sample(models[0].eval(), x, 4).shape == (1, 4)
        model = nn.ParameterList(p for model in models for p in model.parameters() if p.requires_grad)
        load_adapter(other := adapt(GPT(vocab=50, context=12, dim=16, depth=2, heads=2), "ia3"), adapter_state(models[1]))
        assert not adapter_state(merge_and_unload(other))
    """,
    "flamingo.py": """
        lm, vit = GPT(vocab=50, context=12, dim=16, depth=2, heads=2), ViT(image_size=8, patch=4, dim=8, depth=1, heads=2)
        model = Flamingo(lm.requires_grad_(False), vit, patch=4, image=1, latents=3, gate_start=.1)
        x = torch.tensor([[0, 1, 5, 6, 0, 1, 7, 8, 0, -100], [1, 2, 0, 1, 3, 0, -100, -100, -100, -100]])
        features = model.encode(torch.randn(4, 3, 8, 8)).unflatten(0, (2, 2))
        inputs, target = mask(x, image=1)
        loss = distance(model(inputs, model.project(features)), target)
        assert len(sample(model, [[0, 1, 2], [0]], model.project(features), 5, end=0)) == 2
        clip = CLIP(ViT(image_size=8, patch=4, dim=8, depth=1, heads=2), vocab=50, dim=8, patch=4)
        loss = loss + clip_loss(*clip(torch.randn(3, 3, 8, 8), torch.randint(50, (3, 16))))
        model = nn.ModuleList([model.resampler, model.gated, clip])
    """,
}


def sections(script):
    """{ruler: the source under it}"""
    parts = re.split(r"^# -{9,} ([\w ]+)$", (ROOT / script).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def test_same_sections_in_the_same_order(scripts):
    for script in scripts:
        found = list(sections(script))
        assert found[:3] == SECTIONS[:3] and found[-2:] == SECTIONS[-2:], (script, found)


def test_what_scripts_import(scripts):
    for script in scripts:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                         [node.module] if isinstance(node, ast.ImportFrom) else []):
                top = name.split(".")[0]
                assert f"{top}.py" not in scripts, f"{script} imports {name}"
                assert top in ALLOWED, (script, name)


def test_the_model_and_the_method_need_torch_alone(scripts):
    for script in scripts:
        source = sections(script)["the model"] + sections(script)["the method"]
        names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
        assert not names & {"args", "common"}, script
        torch.manual_seed(0)
        pasted = dict(torch=torch, math=math, nn=torch.nn, F=torch.nn.functional)
        exec(source, pasted)
        exec(textwrap.dedent(TRIALS[script]), pasted)
        loss = pasted["loss"]
        loss.backward()
        assert loss.isfinite(), script
        missing = [name for name, p in pasted["model"].named_parameters() if p.grad is None]
        assert not missing, (script, missing)


IMPORTS = "import copy, math, torch\nimport torch.nn.functional as F\nfrom torch import nn\n"


def recipes():
    """{script: the lines of the README below "# <script>: ..."}"""
    (block,) = re.findall(r"```python\n(# simclr.py: .*?)```", (ROOT / "README.md").read_text(), re.S)
    parts = re.split(r"^# (\w+\.py): .*\n", block, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


@pytest.mark.parametrize("script", TRIALS)
def test_the_recipes_of_the_readme_run(script):
    """The imports, the two sections of a script and its recipe, one below the other: a loss with gradients; of mae.py, which
    trains, it falls."""
    text = (ROOT / "README.md").read_text()
    assert all(f"`{line}`" in " ".join(text.split()) for line in IMPORTS.splitlines())
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 32).expand(8, 3, 32, 32) * torch.rand(8, 3, 1, 1)
    losses = []
    pasted = dict(x=x, loader=[(4 * x - 2, None)] * 20, watch=losses.append, tokens=torch.randint(5, 200, (3, 32)))
    exec(IMPORTS + sections(script)["the model"] + sections(script)["the method"]
         + recipes()[script].replace("    loss.backward()", "    watch(loss.item())\n    loss.backward()"), pasted)
    assert pasted["loss"].isfinite()
    if script == "mae.py":
        assert len(losses) == 20 and losses[-1] < .7 * losses[0]
    elif script == "gpt.py":
        assert pasted["new"].shape == (1, 20) and pasted["prompt"][0, 0] == 256 and pasted["text"].shape == (200,)
    elif script == "lora.py":
        assert set(pasted["adapter"]) == {f"linear{i}.{name}" for i in (1, 2) for name in "AB"}
        assert type(pasted["model"].linear1) is torch.nn.Linear
    if script not in ("mae.py", "lora.py"):
        pasted["loss"].backward()


def test_importing_has_no_side_effect(scripts, capsys):
    for script in scripts:
        before = torch.random.get_rng_state()
        exec(compile((ROOT / script).read_text(), script, "exec"), {"__name__": "pasted"})
        assert capsys.readouterr().out == "" and torch.equal(before, torch.random.get_rng_state())


def test_style(scripts):
    """Lines to 100 columns, functions to 45 lines, a docstring on every class and function at the top; the training step is in
    the script, and what runs is torch as it is."""
    for script in scripts:
        assert "loss.backward()" in sections(script)["main"], f"{script}: where is the training step?"
    for script in [*scripts, "common.py"]:
        text = (ROOT / script).read_text()
        assert not re.search(PATCHES, text), script
        long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
        assert not long, f"{script}: lines {long} are over 100 columns"
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{script}: {node.name} is long"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
                assert ast.get_docstring(node), f"{script}: {node.name} has no docstring"
