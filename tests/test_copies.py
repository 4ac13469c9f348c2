"""Repetition is the design, drift its danger: a part that stands in several scripts is the same code,
comments and docstrings aside, in each script of its family."""
import ast

import pytest
from conftest import ROOT

GPT, VIT = ("gpt.py", "lora.py", "flamingo.py"), ("mae.py", "flamingo.py:vit")
FAMILIES = {   # part -> groups of scripts in which it is one and the same
    "Attention": [VIT, GPT],
    "MLP": [VIT, GPT],
    "Block": [VIT, GPT],
    "Cache": [GPT],
    "GPT": [GPT],
    "mask": [("gpt.py", "lora.py")],
    "load_gpt2": [("gpt.py", "lora.py")],
    "distance": [("gpt.py", "lora.py")],
    "ViT": [VIT],
    "sincos_pos_embed": [VIT],
    "gather": [VIT],
    "patchify": [VIT],
}


class Bare(ast.NodeTransformer):
    """Without docstrings; comments are not in a syntax tree anyway."""

    def visit(self, node):
        self.generic_visit(node)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


class Prefix(ast.NodeTransformer):
    """flamingo.py has two of some classes: those of the vision encoder are called ViTBlock and so on."""

    def visit(self, node):
        self.generic_visit(node)
        for field in "name", "id":
            if isinstance(getattr(node, field, None), str):
                setattr(node, field, getattr(node, field).removeprefix("ViT") or "ViT")
        return node


def part(source, name, vit=False):
    """The syntax tree, as text, of a class, function or constant at the top of a source; None if there is none. With
    vit, of the one that is called ViT... or uses those that are."""
    body = ast.parse(source).body
    found = {n.name: n for n in body if hasattr(n, "name")}
    found |= {ast.unparse(n.targets[0]): n for n in body if isinstance(n, ast.Assign)}
    node = found.get(f"ViT{name}", found.get(name)) if vit else found.get(name)
    return ast.dump(Bare().visit(Prefix().visit(node) if vit else node)) if node else None


def differences(sources, name):
    """The scripts, of {script: source}, whose copy differs from that of the first that has one."""
    copies = {script: part(source, name, script.endswith(":vit")) for script, source in sources.items()}
    copies = {script: copy for script, copy in copies.items() if copy}
    return [script for script, copy in copies.items() if copy != next(iter(copies.values()))]


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_are_equal(name):
    for family in FAMILIES[name]:
        sources = {script: (ROOT / script.split(":")[0]).read_text() for script in family}
        assert all(part(source, name, script.endswith(":vit")) for script, source in sources.items())
        assert not differences(sources, name), f"{name}: mend the copy, or give it another name"


def test_a_drifted_copy_is_found():
    source = (ROOT / "mae.py").read_text()
    assert part(source, "Attention") and not part(source, "Nothing")
    line = "x = x + self.attn(self.norm1(x))"
    assert line in source
    comment = source.replace(line, line + "     # residual").replace('"""Pre-norm Transformer block', '"""A block')
    assert not differences({"mae.py": source, "copy.py": comment}, "Block")
    assert differences({"mae.py": source, "copy.py": source.replace(line, line.replace("x + ", ""))}, "Block")
