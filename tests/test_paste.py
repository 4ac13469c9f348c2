"""The model and the method of each script can be pasted elsewhere: they run with torch alone."""
import ast
import math
import re
import textwrap

import pytest
import torch
from conftest import ROOT

SECTIONS = ["settings", "the model", "the method", "look", "main"]
TRIALS = {   # a training step with what was pasted: it must give a finite loss and gradients
    "simclr.py": """
        model = SimCLR(depth=10, width=8, dim=8)
        z = model(augment(torch.rand(4, 3, 16, 16).repeat(2, 1, 1, 1)) - .5)
        loss = ntxent(z, temperature=.5) + triplet(z, margin=.5)
    """,
    "autoencoder.py": """
        model = Autoencoder(size=16, width=4, code=6, bottleneck="noise")
        masked, target = mask(torch.randn(2, 3, 16, 16), corrupt=.3)
        prediction, nats = model(masked)
        loss = distance(prediction, target, nats, price=.1)
    """,
    "mae.py": """
        model = MAE(grid=4, pixels=12, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)
        masked, target = mask(torch.randn(2, 3, 8, 8), patch=2, ratio=.75)
        loss = distance(model(masked), target)
    """,
    "bert.py": """
        model = BERT(vocab=50, context=24, dim=16, depth=2, heads=2)
        x = torch.randint(5, 50, (3, 24))
        for group in torch.arange(24).expand_as(x), spans(3, 24), phrases(x.flatten()).view_as(x):
            masked, target = mask(x, group, vocab=50)
        loss = distance(model(masked), target) + model.pool(x).square().mean()
    """,
    "gpt.py": """
        model = GPT(vocab=50, context=12, dim=16, depth=2, heads=2)
        masked, target = mask(torch.randint(49, (3, 12)), bos=49)
        loss = distance(model(masked), target)
        assert len(sample(model, [[1, 2], [3]], 20, 49, temperature=.8, top_k=9, top_p=.9)[0]) == 20
    """,
    "lora.py": """
        masked, target = mask(torch.randint(49, (3, 12)), bos=49)
        models = [adapt(GPT(vocab=50, context=12, dim=16, depth=2, heads=2), method, ["qkv", "fc2"], rank=2)
                  for method in ("lora", "ia3", "bias", "first", "middle", "last", "full")]
        loss = sum(distance(model(masked), target) for model in models)
        assert len(sample(models[0], torch.tensor([1, 2]), 9)) == 9 and spectrum(torch.eye(3)).shape == (3,)
        model = nn.ParameterList(p for model in models for p in trained(model).values())
    """,
    "flamingo.py": """
        lm, eye = GPT(vocab=50, context=12, dim=16, depth=2, heads=2), ViT(grid=2, pixels=48, dim=8, depth=1, heads=2)
        model = Flamingo(lm.requires_grad_(False), eye, patch=4, image=1, latents=3, start=.1)
        x = torch.tensor([[0, 1, 5, 6, 0, 1, 7, 8, 0, -100], [1, 2, 0, 1, 3, 0, -100, -100, -100, -100]])
        visual = model.see(torch.randn(4, 3, 8, 8)).unflatten(0, (2, 2))
        masked, target = mask(x, image=1)
        loss = distance(model(masked, model.media(visual)), target)
        loss = loss + contrast(visual[0].mean(1), visual[1].mean(1), scale=10.)
        assert len(sample(model, [[0, 1, 2], [0]], model.media(visual), 5, end=0)) == 2
        model = nn.ModuleList([model.resampler, model.gated])
    """,
}


def sections(script):
    """{ruler: the source under it}"""
    parts = re.split(r"^# -{9,} ([\w ]+)$", (ROOT / script).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def test_same_sections_in_the_same_order(scripts):
    for script in scripts:
        assert list(sections(script)) == SECTIONS, script


def test_what_scripts_import(scripts):
    for script in scripts:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                         [node.module] if isinstance(node, ast.ImportFrom) else []):
                top = name.split(".")[0]
                assert f"{top}.py" not in scripts, f"{script} imports {name}"
                assert top in {"torch", "numpy", "common", "contextlib", "copy", "math", "random", "re", "time", "dataclasses", "typing", "pathlib"}, (script, name)


def test_the_model_and_the_method_need_torch_alone(scripts):
    for script in scripts:
        source = sections(script)["the model"] + sections(script)["the method"]
        names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
        assert not names & {"args", "common"}, script
        pasted = dict(torch=torch, math=math, nn=torch.nn, F=torch.nn.functional)
        exec(source, pasted)
        exec(textwrap.dedent(TRIALS[script]), pasted)
        loss = pasted["loss"]
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None for p in pasted["model"].parameters())


def test_the_readme_trains_what_was_pasted():
    """Its imports, mae.py's two sections and its loop, one below the other: the loss falls."""
    imports, loop = (block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
                     if "import math" in block or "loader" in block)
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 32).expand(16, 3, 32, 32) * torch.randn(16, 3, 1, 1)
    losses = []
    pasted = dict(loader=[x] * 20, watch=losses.append)
    exec(imports + sections("mae.py")["the model"] + sections("mae.py")["the method"]
         + loop.replace("    loss.backward()", "    watch(loss.item())\n    loss.backward()"), pasted)
    assert len(losses) == 20 and losses[-1] < .7 * losses[0]


def test_importing_has_no_side_effect(scripts, capsys):
    for script in scripts:
        before = torch.random.get_rng_state()
        exec(compile((ROOT / script).read_text(), script, "exec"), {"__name__": "pasted"})
        assert capsys.readouterr().out == "" and torch.equal(before, torch.random.get_rng_state())


def test_style(scripts):
    """Lines to 100 columns, functions to 45 lines, a docstring on what is public in model and method."""
    for script in [*scripts, "common.py"]:
        text = (ROOT / script).read_text()
        long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
        assert not long, f"{script}: lines {long} are over 100 columns"
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{script}: {node.name} is long"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
                assert ast.get_docstring(node), f"{script}: {node.name} has no docstring"
