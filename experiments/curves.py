"""Line charts as SVG, without a package: means with a band of one standard deviation on each side.

The text of the chart is grey and its ground is empty; the colours of the lines are other ones where
the reader prefers dark pages. So it can be read on a light and on a dark page.
"""
import math
from xml.sax.saxutils import escape

import numpy as np

LIGHT = "#0969da #cf222e #1a7f37 #8250df #bc4c00 #57606a #bf3989 #9a6700".split()
DARK = "#58a6ff #ff7b72 #56d364 #bc8cff #f0883e #b1bac4 #f778ba #e3b341".split()
DASHES = "", "7 4", "2 3"                 # after the eighth line its colours begin again, dashed
WIDE, HIGH, LEFT, TOP, GAP = 330, 260, 52, 30, 62             # of a panel, in pixels
LETTER = 6.6                                                  # pixels of a letter, about


def ticks(low, high):
    """Round numbers from low to high, about five, at equal distances."""
    rough = max(high - low, 1e-9) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= .7 * rough)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [round(i * step, 10) for i in range(first, last + 1)]


def axis(values, log2, low=None, high=None):
    """An axis that holds the values: (place, at). place(value) is between 0 and 1, at are the
    values with a tick. log2: a tick at each of the values, equal distances from one power of two
    to the next; 0, if it is there, is one such distance before the smallest other value. low, high:
    the ends; without them those of the values, with a little room."""
    values = np.unique(np.asarray(values, float))
    if log2:
        above = values[values > 0]
        scale = lambda x: math.log2(x) if x > 0 else math.log2(above[0]) - 1
        at = values.tolist()
        low, high = scale(values[0]), scale(values[-1])
    else:
        room = .05 * (values[-1] - values[0]) or 1.
        low = values[0] - room if low is None else low
        high = values[-1] + room if high is None else high
        scale, at = float, ticks(low, high)
    return lambda x: (scale(x) - low) / (high - low or 1.), at


def text(x, y, words, anchor="middle", more=""):
    """Words at a place in pixels."""
    words = escape(str(words))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{words}</text>'


def frame(left, panel, x_axis, y_axis, names):
    """Title, grid, ticks and names of the axes of a panel that begins at `left`. names: of ticks of
    the x axis."""
    (across, x_ticks), (up, y_ticks) = x_axis, y_axis
    yield text(left + WIDE / 2, TOP - 12, panel["title"])
    digits = max(len(f"{value:g}".partition(".")[2]) for value in y_ticks)
    for value in y_ticks:
        y = TOP + HIGH * (1 - up(value))
        yield f'<path class="g" d="M{left} {y:.1f}h{WIDE}"/>'
        yield text(left - 6, y + 4, f"{value:.{digits}f}", "end")
    for value in x_ticks:
        x = left + WIDE * across(value)
        yield f'<path class="g" d="M{x:.1f} {TOP + HIGH}v5"/>'
        yield text(x, TOP + HIGH + 18, names.get(value, f"{value:g}"))
    yield f'<path class="g" d="M{left} {TOP}v{HIGH}h{WIDE}"/>'
    yield text(left + WIDE / 2, TOP + HIGH + 38, panel["x"])
    x, y = left - 38, TOP + HIGH / 2
    yield text(x, y, panel["y"], more=f' transform="rotate(-90 {x} {y:.0f})"')


def styles(n):
    """Colours and dashes of n lines: the colours in turn, and then again, dashed."""
    return [(i % len(LIGHT), i // len(LIGHT) % len(DASHES)) for i in range(n)]


def attributes(style):
    """The attributes of a line: its class, which has the colour, and its dashes."""
    colour, dashes = style
    return f'class="c{colour}"' + f' stroke-dasharray="{DASHES[dashes]}"' * (dashes > 0)


def curve(left, style, points, across, up):
    """A line of points (x, mean, standard deviation), over its band."""
    x = [left + WIDE * across(p[0]) for p in points]
    height = lambda values: [TOP + HIGH * (1 - up(value)) for value in values]
    path = lambda x, y: "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))
    mean = height(p[1] for p in points)
    if any(p[2] for p in points):
        above, below = (height(p[1] + sign * p[2] for p in points) for sign in (1, -1))
        yield (f'<path class="c{style[0]} b" d="M{path(x + x[::-1], above + below[::-1])}'
               'Z"/>')
    yield f'<path {attributes(style)} stroke-width="2" d="M{path(x, mean)}"/>'
    for a, b in zip(x, mean):
        yield f'<circle class="c{style[0]} f" r="2.5" cx="{a:.1f}" cy="{b:.1f}"/>'


def legend(lines, width):
    """Which of the lines {name: style} is which, in rows of at most `width` pixels: the SVG, and
    how high it is."""
    parts, x, y = [], LEFT, TOP + HIGH + 64
    for name, style in lines.items():
        long = 40 + LETTER * len(name)
        if x > LEFT and x + long > width:
            x, y = LEFT, y + 20
        parts.append(f'<path {attributes(style)} stroke-width="2" d="M{x:.0f} {y - 4}h22"/>')
        parts.append(text(x + 27, y, name, "start"))
        x += long
    return parts, y + 12


def draw(panels, log2=False, y_ends=(None, None), ticks={}, style=None):
    """A chart as the text of an SVG file.

    panels, side by side with the same axes: [dict(title, x, y: what the axes show, in words, lines=
    {name: [(x, mean, standard deviation), ...]})]. A name has the same colour in each panel. log2:
    of the x axis, see axis(); y_ends: the lowest and the highest y, or None for those of the lines.
    ticks: {x: its name, instead of the number}; style: {name: (index of a colour, of DASHES)}.
    """
    all = [point for panel in panels for points in panel["lines"].values() for point in points]
    x_axis = axis([p[0] for p in all], log2)
    y_axis = axis([p[1] + sign * p[2] for p in all for sign in (1, -1)], False, *y_ends)
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    style = style or dict(zip(names, styles(len(names))))
    width = LEFT + len(panels) * (WIDE + GAP) - GAP + 16
    rules = lambda colours: "".join(f".c{i}{{stroke:{c}}}.f.c{i},.b.c{i}{{fill:{c}}}"
                                    for i, c in enumerate(colours))
    key, height = legend({name: style[name] for name in names}, width)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-size="12" font-family="sans-serif">',
             "<style>path{fill:none}text{fill:#808080}.g{stroke:#808080;stroke-width:.5}"
             ".b{stroke:none!important;fill-opacity:.15}.f{stroke:none!important}"
             f"{rules(LIGHT)}@media(prefers-color-scheme:dark){{{rules(DARK)}}}</style>"]
    for n, panel in enumerate(panels):
        left = LEFT + n * (WIDE + GAP)
        parts += frame(left, panel, x_axis, y_axis, ticks)
        for name, points in panel["lines"].items():
            parts += curve(left, style[name], points, x_axis[0], y_axis[0])
    return "\n".join([*parts, *key, "</svg>"]) + "\n"
