"""The page of a report: one file of HTML, drawn from its document; nothing is measured here.

No script, no font, no address of anything outside: pictures are data, charts are boxes that CSS sizes, so that they
read the same at any width. What stands in an output may come from anyone, so every text is escaped, and the page
forbids itself to load or run anything. `cli` writes it; `report` makes the document.
"""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from typing import Any

Pictures = Sequence[tuple[bytes, bytes]]  # WebP of each example and of its first frame

_FIRST = 12
_PSNR_ENDS_DB = (20, 25, 30, 35, 40)
_LONG_CAPTION = 180
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_ASKED = {
    "fps": "Frames per second",
    "buckets": "Buckets",
    "clips_per_video": "Clips of a video at most",
    "clip_stride": "Frames between clips",
    "store": "Stored",
    "store_dtype": "Stored as",
    "format": "Files",
    "compute_dtype": "Computed in",
    "device_type": "Computed on",
    "caption_column": "Captions from",
    "upscale": "Small pictures enlarged",
}
_PANELS = {"original": "original", "reconstruction": "from the latent", "latent": "latent, channels 0\u20132"}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
# Colours of Okabe and Ito, which the colour-blind tell apart; lighter ones on a dark ground.
_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #16191d; --faint: #5a626c; --rule: #e1e4e8;
  --track: #e9ecf0; --main: #0072b2; --good: #00825f; --bad: #c2410c; --warn: #fff4e5; --warn-rule: #e69f00; }
@media (prefers-color-scheme: dark) { :root { --ground: #111317; --card: #1a1d22; --ink: #e8eaed; --faint: #a3abb5;
  --rule: #2d3239; --track: #2a2f36; --main: #56b4e9; --good: #2fd6a3; --bad: #ff8f57; --warn: #2b2314;
  --warn-rule: #e69f00; } }
* { box-sizing: border-box; }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 .75rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 48rem; }
.faint, figcaption, footer, .note { color: var(--faint); font-size: .875rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; margin-top: 1rem;
  min-width: 0; padding: 1.25rem; }
section > :last-child { margin-bottom: 0; }
.two { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr));
  margin-top: 1rem; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; line-height: 1.25; }
.tile span { color: var(--faint); font-size: .875rem; }
.warn { background: var(--warn); border-color: var(--warn-rule); border-left-width: .375rem; }
ul { margin: 0; padding-left: 1.25rem; }
dl { display: grid; gap: .25rem 1rem; grid-template-columns: minmax(6.5rem, 11rem) minmax(0, 1fr); margin: 0 0 .75rem; }
dt { color: var(--faint); }
dd { margin: 0; }
.bars { align-items: center; display: grid; font-size: .9375rem; gap: .35rem .75rem;
  grid-template-columns: minmax(6.5rem, max-content) minmax(3rem, 1fr) minmax(4rem, max-content);
  margin-bottom: .75rem; }
.bars > span { max-width: 12rem; }
.bars .value { font-variant-numeric: tabular-nums; text-align: right; }
.track { background: var(--track); border-radius: .25rem; display: flex; height: 1.1rem; overflow: hidden;
  position: relative; }
.fill { background: var(--main); height: 100%; }
.fill.good { background: var(--good); } .fill.bad { background: var(--bad); }
.columns { align-items: flex-end; border-bottom: 1px solid var(--faint); display: flex; gap: 1px; height: 9rem; }
.columns > i { background: var(--main); border-radius: 2px 2px 0 0; flex: 1 1 0; min-width: 0; }
.ends { color: var(--faint); display: flex; flex-wrap: wrap; font-size: .8125rem; justify-content: space-between; }
.channels { column-gap: 2rem; columns: 20rem auto; margin-bottom: .75rem; }
.channel { align-items: center; break-inside: avoid; display: grid; font-size: .8125rem; gap: .5rem;
  font-variant-numeric: tabular-nums; grid-template-columns: 1.6rem minmax(3rem, 1fr) 8.5rem; padding: .1rem 0; }
.channel .track { height: .8rem; }
.span { background: var(--main); border-radius: .25rem; height: 100%; min-width: 2px; opacity: .75;
  position: absolute; }
.zero { background: var(--ink); height: 100%; position: absolute; width: 1px; }
.mean { background: var(--ink); border-radius: 1px; height: 100%; position: absolute; width: 3px; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin-bottom: .75rem; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .8rem .3rem 0; text-align: left; white-space: nowrap; }
th { color: var(--faint); font-weight: 500; }
.number { text-align: right; }
.gallery { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.example { border: 1px solid var(--rule); border-radius: .5rem; display: flex; flex-direction: column; margin: 0;
  min-width: 0; overflow: hidden; }
.example picture { background: var(--track); display: flex; justify-content: center; }
.example img { display: block; height: auto; max-width: 100%; }
.example figcaption { padding: .6rem .75rem .75rem; }
.panels { color: var(--faint); display: flex; font-size: .8125rem; line-height: 1.3; margin: 0 auto; padding-top: .3rem;
  text-align: center; width: 100%; }
.panels span { flex: 1 1 0; min-width: 0; }
summary .caption { display: inline; }
details[open] > summary .caption { display: none; }
.more { margin-top: 1rem; } .more > summary { margin-bottom: 1rem; }
.caption { color: var(--ink); display: block; font-size: .9375rem; unicode-bidi: isolate; }
details > summary { cursor: pointer; }
details.reason { border-top: 1px solid var(--rule); padding: .5rem 0; }
details.reason ul { margin-top: .5rem; }
pre { background: var(--ground); border-radius: .5rem; font-size: .8125rem; overflow: auto; padding: .75rem;
  white-space: pre-wrap; }
footer { margin-top: 1.5rem; }
@media (max-width: 30rem) { body { padding: 1rem .6rem 2rem; } section { padding: 1rem .8rem; }
  dl { grid-template-columns: 7rem minmax(0, 1fr); gap: .25rem .75rem; }
  .channel { grid-template-columns: 1.4rem minmax(3rem, 1fr) 7.5rem; }
  table { font-size: .8125rem; } th, td { padding-right: .45rem; } }
@media print { body { background: #fff; } section, .example { break-inside: avoid; } }
"""


def page(document: Mapping[str, Any], pictures: Pictures) -> str:
    """The page as text; `pictures` has an entry for each of the document's `examples`."""
    assert len(pictures) == len(document["examples"]), (
        f"{len(pictures)} pictures of {len(document['examples'])} examples"
    )
    title = _name(document["output"])
    parts = [
        "<header>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="faint">Latents in {_text(document["output"])}, {_snapshot(document)}</p>',
        "</header>",
        _tiles(document),
        _warnings(document),
        _gallery(document, pictures),
        '<div class="two"><div>',
        _funnel(document),
        _quality(document),
        "</div>",
        _asked(document),
        "</div>",
        _rejections(document),
        '<div class="two">',
        _buckets(document),
        _durations(document),
        "</div>",
        _channels(document),
        _time(document),
        _notes(document),
        f"<footer>Looked at {_moment(document['reported_at'])}. Figures of samples say so, others are exact.</footer>",
    ]
    return _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(part for part in parts if part))


def _text(value: object) -> str:
    """Escaped; control characters and those that turn the direction of what follows are shown as what they are not."""
    text = str(value)
    shown = "".join("\ufffd" if _is_hidden(char) else char for char in text)
    return escape(shown, quote=True)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Co") or char in _DIRECTIONS


def _words(value: str) -> str:
    """As `_text`, with line ends and other white space as single spaces."""
    return _text(" ".join(value.split()))


def _moment(stated: str) -> str:
    """ "2026-11-23 15:31 UTC" of an ISO time."""
    return f"{datetime.fromisoformat(stated).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _name(uri: str) -> str:
    """The last two parts of an address: the last one alone is often just "latents"."""
    return "/".join(part for part in uri.partition("://")[2 if "://" in uri else 0].split("/")[-2:] if part) or uri


def _snapshot(document: Mapping[str, Any]) -> str:
    number = document["snapshot"]
    return "no snapshot yet" if number is None else f"snapshot {number:,} and all committed since"


def _bytes(number: float) -> str:
    for unit in _UNITS:
        if number < 1000 or unit == _UNITS[-1]:
            return f"{number:,.0f} {unit}" if unit == "B" or number >= 100 else f"{number:,.1f} {unit}"
        number /= 1000
    raise AssertionError("the last unit takes any number")


def _span(seconds: float) -> str:
    if not seconds:
        return "\u2013"
    if seconds < 120:
        return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _share(part: int, whole: int) -> str:
    if not whole or part in (0, whole):
        return "100 %" if part else "0 %"
    percent = 100 * part / whole
    return "< 0.1 %" if percent < 0.1 else "> 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


def _tiles(document: Mapping[str, Any]) -> str:
    accounts, buckets, psnr = document["accounts"], document["buckets"], document["quality"]["psnr_db"]
    num_bytes = _latent_bytes(document)
    tiles = [
        (f"{accounts['num_records']:,}", "clips as latents"),
        (f"{accounts['num_videos_ok']:,}", f"of {accounts['num_videos']:,} videos and images"),
        (_share(accounts["num_videos_rejected"], accounts["num_videos"]), "of them rejected"),
    ]
    if buckets["video_s"]:
        tiles.append((_span(buckets["video_s"]), "of video"))
    if num_bytes:
        tiles.append((_bytes(num_bytes), f"{buckets['num_pixel_bytes'] / num_bytes:,.0f} times less than the pixels"))
    if psnr is not None:
        tiles.append((f"{psnr['mean']:.1f} dB", f"PSNR of {document['quality']['num_compared']} sampled clips"))
    inner = "".join(f'<div class="tile"><b>{_text(big)}</b><span>{_text(small)}</span></div>' for big, small in tiles)
    return f'<div class="tiles">{inner}</div>'


def _latent_bytes(document: Mapping[str, Any]) -> int:
    """Of one of the forms that the same latents are stored in."""
    files = document["files"]
    form = next((files[name] for name in ("parquet", "webdataset") if name in files), None)
    return 0 if form is None else int(form["num_bytes"])


def _warnings(document: Mapping[str, Any]) -> str:
    if not document["warnings"]:
        return ""
    inner = "".join(f"<li>{_text(line)}</li>" for line in document["warnings"])
    return f'<section class="warn"><h2>Look at this first</h2><ul>{inner}</ul></section>'


def _gallery(document: Mapping[str, Any], pictures: Pictures) -> str:
    examples = document["examples"]
    if not examples:
        return ""
    has_both = any(example["psnr_db"] is not None for example in examples)
    what = "Originals, decoded again from their source, beside what the latents decode to." if has_both else ""
    drawn = document["sample"]
    lot = f"{len(examples)} clips by lot (seed {drawn['seed']}) from every bucket of {drawn['num_files']} files."
    # By lot which clips are seen first; pictures of one shape stand together.
    figures = [(one["bucket"], _example(one, *both)) for one, both in zip(examples, pictures, strict=True)]
    first, rest = ("".join(text for _, text in sorted(some)) for some in (figures[:_FIRST], figures[_FIRST:]))
    more = (
        f'<details class="more"><summary>{len(figures) - _FIRST} more clips</summary>'
        f'<div class="gallery">{rest}</div></details>'
    )
    return (
        f'<section><h2>What the latents show</h2><p class="faint">{_text(f"{what} {lot}".strip())}</p>'
        f'<div class="gallery">{first}</div>{more if rest else ""}</section>'
    )


def _example(example: Mapping[str, Any], picture: bytes, still: bytes) -> str:
    panels = "".join(f"<span>{_text(_PANELS[name])}</span>" for name in example["panels"])
    where, width_px = f"{example['key']}, clip {example['clip_index']}", example["width_px"]
    facts = [example["bucket"]]
    if example["fps"]:
        facts.append(f"{example['start_s']:.2f}\u2013{example['end_s']:.2f} s")
    if example["psnr_db"] is not None:
        facts.insert(0, f"PSNR {example['psnr_db']:.1f} dB")
    if example["why_no_original"]:
        facts.append("no original")
    alt = f"{where}: {' beside '.join(_PANELS[name] for name in example['panels'])}"
    return (
        f'<figure class="example"><picture><source media="(prefers-reduced-motion: reduce)" srcset="{_uri(still)}">'
        f'<img alt="{_text(alt)}" src="{_uri(picture)}" width="{width_px}" height="{example["height_px"]}" '
        f'decoding="async"></picture><div class="panels" style="max-width:max(9rem,{width_px}px)">{panels}</div>'
        f'<figcaption>{_caption(example["caption"])}<div title="{_text(example["source_uri"])}">{_text(where)}</div>'
        f"<div>{_text(' · '.join(facts))}</div></figcaption></figure>"
    )


def _caption(caption: str) -> str:
    if not caption.strip():
        return '<span class="note">no caption</span>'
    words = " ".join(caption.split())
    if len(words) <= _LONG_CAPTION:
        return f'<bdi class="caption" dir="auto">{_text(words)}</bdi>'
    start = words[:_LONG_CAPTION].rpartition(" ")[0] or words[:_LONG_CAPTION]
    return (
        f'<details><summary><bdi class="caption" dir="auto">{_text(start)} \u2026</bdi></summary>'
        f'<bdi class="caption" dir="auto">{_text(words[:4000])}</bdi></details>'
    )


def _uri(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode("ascii")


def _funnel(document: Mapping[str, Any]) -> str:
    accounts = document["accounts"]
    planned = accounts["num_videos"] + accounts["num_videos_left"]
    videos = [("decided", accounts["num_videos"], "")]
    if accounts["num_videos_left"]:
        videos.insert(0, ("planned", planned, ""))
    videos += [
        ("with a latent", accounts["num_videos_ok"], "good"),
        ("rejected", accounts["num_videos_rejected"], "bad"),
    ]
    clips = [
        ("cut", accounts["num_clips"], ""),
        ("as latents", accounts["num_records"], "good"),
        ("rejected", accounts["num_clips_rejected"], "bad"),
    ]
    rest = f"{accounts['num_frames']:,} frames in {accounts['num_shards']:,} shards."
    return (
        "<section><h2>From videos to latents</h2><h3>Videos and images</h3>"
        f"{_counted(videos)}<h3>Clips</h3>{_counted(clips)}"
        f'<p class="faint">{rest} A video is rejected when none of its clips became a latent.</p></section>'
    )


def _counted(rows: Sequence[tuple[str, int, str]]) -> str:
    whole = max((number for _, number, _ in rows), default=0)
    return _bars((label, number, f"{number:,} ({_share(number, whole)})", kind) for label, number, kind in rows)


def _bars(rows: Iterable[tuple[str, float, str, str]]) -> str:
    """Bars of label, number, its words, and "good", "bad" or ""."""
    rows = list(rows)
    most = max((number for _, number, _, _ in rows), default=0) or 1
    inner = "".join(
        f'<span>{_text(label)}</span><div class="track"><div class="fill {kind}" '
        f'style="width:{100 * number / most:.2f}%"></div></div><span class="value">{_text(words)}</span>'
        for label, number, words, kind in rows
    )
    return f'<div class="bars">{inner}</div>'


def _asked(document: Mapping[str, Any]) -> str:
    asked = document["asked"]
    model, held = asked["model"], asked["configuration"]
    trained = "" if model["is_trained"] else " (untrained)"
    facts = [
        ("Model", f"{model['model']}{trained}"),
        ("Weights (SHA-256)", f"{model['weights_sha256'][:16]}\u2026"),
        (
            "Latents",
            f"{model['latent_channels']} channels, {model['spatial_compression']}x{model['spatial_compression']} "
            f"smaller in space, {model['temporal_compression']}x in time",
        ),
    ]
    facts += [(label, _plain(held[name], name)) for name, label in _ASKED.items() if held.get(name) is not None]
    for name, entry in document["files"].items():
        facts.append((f"{name} files", f"{entry['num_files']:,}, {_bytes(entry['num_bytes'])}"))
    facts += [("Sources", f"{source['uri']} ({source['num_records']:,} shards)") for source in document["sources"][:3]]
    everything = "\n".join(map(_text, json.dumps(asked, indent=1, ensure_ascii=False).split("\n")))
    inner = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    return (
        f"<section><h2>What was asked</h2><dl>{inner}</dl><details><summary>All of the configuration</summary>"
        f"<pre>{everything}</pre>"
        "</details></section>"
    )


def _plain(value: object, name: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and name == "fps" else str(value)


def _quality(document: Mapping[str, Any]) -> str:
    compared = [example for example in document["examples"] if example["psnr_db"] is not None]
    if not compared:
        return ""
    ends = [-math.inf, *_PSNR_ENDS_DB, math.inf]
    labels = [f"under {_PSNR_ENDS_DB[0]} dB", *(f"{low} to {high} dB" for low, high in pairwise(_PSNR_ENDS_DB))]
    labels.append(f"{_PSNR_ENDS_DB[-1]} dB and more")
    numbers = [sum(low <= one["psnr_db"] < high for one in compared) for low, high in pairwise(ends)]
    shown = [row for row in zip(labels, numbers, strict=True) if row[1]]
    bars = _bars((label, number, f"{number:,} ({_share(number, len(compared))})", "") for label, number in shown)
    psnr, worst = document["quality"]["psnr_db"], min(compared, key=lambda one: float(one["psnr_db"]))
    return (
        '<section><h2>Quality of reconstructions</h2><p class="faint">PSNR of the clips above against the frames that '
        f"their sources give.</p>{bars}<p>Mean {psnr['mean']:.1f} dB, median {psnr['median']:.1f} dB, best "
        f"{psnr['highest']:.1f} dB; worst {worst['psnr_db']:.1f} dB: {_words(worst['key'])}, clip "
        f"{worst['clip_index']}.</p></section>"
    )


def _rejections(document: Mapping[str, Any]) -> str:
    reasons = document["rejections"]
    if not reasons:
        return "<section><h2>Rejections</h2><p>None: everything that was met became latents.</p></section>"
    bars = _bars((one["reason"], one["number"], f"{one['number']:,}", "bad") for one in reasons)
    told = "".join(_reason(one) for one in reasons)
    return (
        '<section><h2>Rejections by reason</h2><p class="faint">Videos and clips together.</p>'
        f"{bars}<h3>What they mean, with examples</h3>{told}</section>"
    )


def _reason(one: Mapping[str, Any]) -> str:
    examples = []
    for example in one["examples"]:
        clip = "" if example["clip_index"] is None else f", clip {example['clip_index']}"
        examples.append(
            f"<li><b>{_words(example['key'])}</b>{clip}: {_words(example['message'])}"
            f'<div class="faint">{_words(example["source_uri"])}</div></li>'
        )
    inner = f"<ul>{''.join(examples)}</ul>" if examples else '<p class="faint">No example could be read.</p>'
    return (
        f'<details class="reason"><summary><b>{_text(one["reason"])}</b> \u2013 {_text(one["meaning"])}</summary>'
        f"{inner}</details>"
    )


def _buckets(document: Mapping[str, Any]) -> str:
    rows = document["buckets"]["rows"]
    whole = sum(rows.values())
    bars = _bars((name, number, f"{number:,} ({_share(number, whole)})", "") for name, number in rows.items())
    return (
        '<section><h2>Clips by bucket</h2><p class="faint">Width x height in pixels x frames, exact.</p>'
        f"{bars}</section>"
    )


def _durations(document: Mapping[str, Any]) -> str:
    sample = document["sample"]
    ends, numbers = sample["durations_s"]["ends"], sample["durations_s"]["num_videos"]
    labels = [f"under {_end(ends[0])}"]
    labels += [f"{_end(low)} to {_end(high)}" for low, high in pairwise(ends)]
    labels += [f"{_end(ends[-1])} and more"]
    there = [place for place, number in enumerate(numbers) if number]
    shown = range(there[0], there[-1] + 1) if there else range(0)
    bars = _bars((labels[place], numbers[place], f"{numbers[place]:,}", "") for place in shown)
    shapes = ", ".join(f"{name} ({number:,})" for name, number in sample["source_shapes"].items())
    of = f"Of {sample['num_videos']:,} sampled videos and images; images have no duration."
    return (
        f'<section><h2>Duration of the sources</h2><p class="faint">{_text(of)}</p>{bars}'
        + (f'<p class="faint">Commonest sizes: {_text(shapes)}.</p>' if shapes else "")
        + "</section>"
    )


def _end(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min"


def _channels(document: Mapping[str, Any]) -> str:
    sample, model = document["sample"], document["asked"]["model"]
    channels = sample["channels"]
    if not channels:
        return ""
    scale, shift = model["scaling_factor"], model["shift_factor"]
    # As a diffusion model takes them: the model says by which numbers they come near 0 with deviation 1.
    shown = [(scale * (c["mean"] - shift), abs(scale) * c["deviation"]) for c in channels]
    reach = max(max(abs(mean) + deviation for mean, deviation in shown), 1e-9)
    rows = "".join(_channel(number, mean, deviation, reach) for number, (mean, deviation) in enumerate(shown))
    mean = sum(mean for mean, _ in shown) / len(shown)
    overall = (sum(deviation**2 + (m - mean) ** 2 for m, deviation in shown) / len(shown)) ** 0.5
    low, high = min(c["low"] for c in channels), max(c["high"] for c in channels)
    about = (
        f"Scaled as the diffusion model takes them, {scale:g} x (latent \u2212 {shift:g}), by which the model means to "
        f"bring them near mean 0 and deviation 1. Here, all values together: mean {mean:.3f}, deviation {overall:.3f}."
    )
    more = (
        f"{sample['num_clips']:,} clips of {sample['num_files']:,} of {sample['num_files_of']:,} files, "
        f"{sample['num_values']:,} values, of them {sample['num_nonfinite']:,} not finite; as stored they go from "
        f"{low:.3g} to {high:.3g}. Each box goes from one deviation below the mean to one above; the thin line is zero."
    )
    return (
        f"<section><h2>Latents by channel</h2><p>{_text(about)}</p>"
        f'<div class="channels">{rows}</div><p class="faint">{_text(more)}</p></section>'
    )


def _channel(number: int, mean: float, deviation: float, reach: float) -> str:
    def place(value: float) -> float:
        return 50 + 50 * value / reach

    left, width = place(mean - deviation), 100 * deviation / reach
    return (
        f'<div class="channel"><span class="number">{number}</span><div class="track">'
        f'<div class="span" style="left:{left:.2f}%;width:{width:.2f}%"></div><div class="zero" style="left:50%"></div>'
        f'<div class="mean" style="left:calc({place(mean):.2f}% - 1px)"></div></div>'
        f"<span>{mean:+.2f} \u00b1 {deviation:.2f}</span></div>"
    )


def _time(document: Mapping[str, Any]) -> str:
    found = document["time"]
    if not found["sittings"]:
        return ""
    rows = "".join(
        f'<tr><td>{_text(one["first"][:-3])}</td><td class="number">{_span(one["seconds"])}</td>'
        f'<td class="number">{one["num_records"]:,}</td><td class="number">{one["num_clips"]:,}</td>'
        f'<td class="number">{_rate(one["clips_per_s"])}</td></tr>'
        for one in found["sittings"]
    )
    table = (
        '<div class="wide"><table><tr><th>from (UTC)</th><th class="number">for</th><th class="number">shards</th>'
        f'<th class="number">clips</th><th class="number">clips/s</th></tr>{rows}</table></div>'
    )
    pauses = "the last ten of " if found["num_sittings"] > len(found["sittings"]) else ""
    words = (
        "Each record says when its shard was done, by the clock of the machine that encoded it. Pauses of an hour and "
        f"more part the rows ({pauses}{found['num_sittings']:,}). Rates begin with the first shard done, as nothing "
        "says when it was begun."
    )
    return (
        f"<section><h2>Throughput over time</h2>{_throughput(found['throughput'])}{table}"
        f'<p class="faint">{_text(words)}</p></section>'
    )


def _rate(clips_per_s: float | None) -> str:
    return "\u2013" if clips_per_s is None else f"{clips_per_s:,.2f}"


def _throughput(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return '<p class="faint">Too few shards were done at different seconds for a course.</p>'
    most = max(max(found["num_clips"]), 1)
    span = _span(found["span_s"])
    columns = "".join(
        f'<i style="height:{100 * number / most:.2f}%" title="{number:,} clips"></i>' for number in found["num_clips"]
    )
    return (
        f'<p class="faint">Clips in each {span}, at most {most:,} ({most / found["span_s"]:,.2f} clips/s).</p>'
        f'<div class="columns" role="img" aria-label="Clips in each {span}, at most {most:,}">{columns}</div>'
        f'<p class="ends"><span>{_text(found["first"])}</span><span>{_text(found["last"])} UTC</span></p>'
    )


def _notes(document: Mapping[str, Any]) -> str:
    reasons = document["quality"]["why_no_original"]
    lines = [*document["notes"], *(f"{number:,} clips without an original: {why}." for why, number in reasons.items())]
    if not lines:
        return ""
    inner = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<section><h2>What this report could not see</h2><ul class="faint">{inner}</ul></section>'
