"""The tables and the picture page of an evaluation, drawn from its document; nothing is measured here.

Tables of the Markdown file and of the page come from the same rows, so that they cannot disagree. The page is one file
without outside parts and without scripts: pictures are JPEG data, curves are SVG. `jobs/evaluate_vae.py` calls it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from cvvae.config import TEMPORAL_COMPRESSION
from cvvae.evaluation import ClipPictures, Pixels
from pipeline.pictures import spread

Line = Sequence[tuple[float, float]]

_GROUPS = ("all", "moving", "static", "images")
_METHODS = {
    "video_vae": "video VAE",
    "image_vae": "image VAE, every frame",
    "image_vae_interpolated": "image VAE, key frames + interpolation",
    "image_vae_held": "image VAE, key frames held",
}
_NOTHING = "-"
_NUM_SHOWN = 5
_ERROR_GAIN = 4
_JPEG_QUALITY = 85
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer><p>Measured {created}.</p></footer>
</body>
</html>
"""
# Colours of Okabe and Ito, which the colour-blind tell apart; lighter ones on a dark ground.
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --faint: #595959; --rule: #d0d0d0;
  --s0: #0072b2; --s1: #00694d; --s2: #b34700; --s3: #a03d78; --s4: #5c5c00; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --ink: #ececec; --faint: #b0b0b0; --rule: #44484e;
  --s0: #56b4e9; --s1: #2fd6a3; --s2: #ff9d5c; --s3: #e59ac8; --s4: #f0e442; } }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 84rem; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
li, p { overflow-wrap: anywhere; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--rule); padding: .25rem 1rem .25rem 0; text-align: left; }
.number { text-align: right; }
th { font-weight: 600; vertical-align: bottom; }
section { border-top: 2px solid var(--rule); margin-top: 2rem; }
figure { margin: 0 0 1rem; }
figcaption, footer { color: var(--faint); }
img { display: block; height: auto; max-width: 100%; }
svg { display: block; max-width: 44rem; width: 100%; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); stroke-dasharray: 8 3; }
.s2 { stroke: var(--s2); stroke-dasharray: 2 3; }
.s3 { stroke: var(--s3); stroke-dasharray: 8 3 2 3; } .s4 { stroke: var(--s4); stroke-dasharray: 12 4; }
"""


@dataclass(frozen=True, slots=True)
class PicturedClip:
    """Pictures of one clip and its place in the document's `clips`."""

    index: int
    pictures: ClipPictures


@dataclass(frozen=True, slots=True)
class Table:
    """One table: `rows` hold the cells as they are shown, one text for each entry of `header`."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """The tables of an evaluation; those of which nothing was measured are left out."""
    made = [_reconstruction(document["summary"])]
    if document["teacher"] is not None:
        made += [_compatibility(document["summary"]), _channels(document["channels"])]
    made += [table for table in (_seams(document["clips"]), _timing(document["timing"])) if table is not None]
    if document["rejected"]:
        made.append(_rejected(document["rejected"]))
    return made


def markdown(document: Mapping[str, Any]) -> str:
    """The tables as Markdown, under a line each on model, image VAE, clips and warnings."""
    lines = [f"# Evaluation of {_plain(document['model']['name'])}", ""]
    lines += [f"* {_plain(fact)}" for fact in facts(document)]
    for table in tables(document):
        lines += ["", f"## {table.title}", "", *([table.note, ""] if table.note else [])]
        lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in (table.header, ["---"] * len(table.header))]
        lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def page(document: Mapping[str, Any], pictured: Sequence[PicturedClip]) -> str:
    """The page: facts, tables, a section of pictures and curves for each of `pictured`, and all clips in one table."""
    title = f"Evaluation of {document['model']['name']}"
    body = [f"<h1>{escape(title)}</h1>", "<ul>"]
    body += [f"<li>{escape(fact)}</li>" for fact in facts(document)]
    body += ["</ul>", *(_html_table(table) for table in tables(document))]
    for clip in pictured:
        body.append(_clip_section(document["clips"][clip.index], clip.pictures))
    body.append(_html_table(_all_clips(document["clips"])))
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body), created=escape(document["created_at"]))


def _clip_section(clip: Mapping[str, Any], pictures: ClipPictures) -> str:
    figures = clip["figures"]
    name = f"{clip['key']}, clip {clip['clip_index']}"
    parts = [f"<section><h2>{escape(name)}</h2>", f"<p>{escape(_clip_facts(clip))}</p>"]
    num_frames = len(pictures.original)
    shown = spread(num_frames, _NUM_SHOWN)
    # A latent stands for the frames of its group, which ends with its key frame.
    groups = [-(-index // TEMPORAL_COMPRESSION) for index in shown]
    rows: list[tuple[str, Pixels, str]] = [("original", pictures.original[shown], "")]
    rows.append(("video VAE", pictures.video_vae[shown], f", PSNR {_decibels(figures['video_vae']['psnr_db'])} dB"))
    if pictures.image_decoder is not None and pictures.image_vae_interpolated is not None:
        keys_db = figures["compatibility"]["image_decoder"]["psnr_db"]
        between_db = figures["image_vae_interpolated"]["psnr_db"]
        rows.append(
            (
                "image decoder on the video latents of these frames' groups",
                pictures.image_decoder[groups],
                f", PSNR {_decibels(keys_db)} dB against the key frames",
            )
        )
        rows.append(
            (
                "image VAE, key frames + interpolation",
                pictures.image_vae_interpolated[shown],
                f", PSNR {_decibels(between_db)} dB",
            )
        )
    rows.append((f"error of the video VAE, {_ERROR_GAIN} times", _error_map(pictures.video_vae, pictures)[shown], ""))
    if pictures.image_vae_interpolated is not None:
        label = f"error of key frames + interpolation, {_ERROR_GAIN} times"
        rows.append((label, _error_map(pictures.image_vae_interpolated, pictures)[shown], ""))
    numbers = ", ".join(map(str, shown))
    for label, strip, more in rows:
        alt = f"{name}: {label}, frames {numbers}"
        parts.append(
            f'<figure><figcaption>{escape(label + more)}</figcaption><img alt="{escape(alt)}" '
            f'src="{_jpeg_uri(strip)}" width="{strip.shape[2] * len(strip)}" height="{strip.shape[1]}"></figure>'
        )
    if num_frames > 1:
        parts += _clip_curves(name, figures)
    return "\n".join([*parts, "</section>"])


def _clip_facts(clip: Mapping[str, Any]) -> str:
    figures = clip["figures"]
    if figures["num_frames"] == 1:
        return f"An image, {clip['bucket']}, from {clip['source_uri']}."
    return (
        f"{'Moving' if figures['is_moving'] else 'Static'}, {clip['bucket']} at {_rate(clip['fps'])}, "
        f"from second {clip['start_s']:.2f} of {clip['source_uri']}: {figures['motion']:.2f} levels from frame to "
        f"frame, its own key frames interpolated give {_decibels(figures['interpolation_psnr_db'])} dB."
    )


def _clip_curves(name: str, figures: Mapping[str, Any]) -> list[str]:
    present = {label: figures[method] for method, label in _METHODS.items() if figures[method] is not None}
    psnr = {label: list(enumerate(one["frame_psnr_db"])) for label, one in present.items()}
    crossed = figures["compatibility"]
    if crossed is not None:
        by_latent = crossed["image_decoder"]["frame_psnr_db"]
        psnr["image decoder on video latents"] = [(TEMPORAL_COMPRESSION * j, db) for j, db in enumerate(by_latent)]
    temporal = {
        label: [(t + 0.5, value) for t, value in enumerate(one["frame_temporal_difference"])]
        for label, one in present.items()
    }
    parts = [
        _curves(f"{name}: PSNR by frame, dB", psnr),
        _curves(f"{name}: temporal error between frames, levels of 255", temporal),
    ]
    if figures["probe"] is not None:
        parts += _probe_curves(name, figures["probe"])
    header = ["frame", *psnr]
    by_frame = {label: dict(points) for label, points in psnr.items()}
    rows = [[str(t), *(_decibels(by_frame[label].get(t)) for label in psnr)] for t in range(figures["num_frames"])]
    table = _html_table(Table("PSNR by frame, dB", "", header, rows), level=3)
    return [*parts, f"<details><summary>PSNR of {escape(name)} by frame, in numbers</summary>{table}</details>"]


def _probe_curves(name: str, probe: Mapping[str, Any]) -> list[str]:
    cut = {label: probe[key] for key, label in (("chunked", "in chunks"), ("tiled", "in tiles")) if probe[key]}
    latents = {label: list(enumerate(one["by_latent"])) for label, one in cut.items()}
    psnr = {label: list(enumerate(one["frame_psnr_db_difference"])) for label, one in cut.items()}
    parts = []
    if cut:
        parts.append(_curves(f"{name}: latents in pieces against one call, by latent, rms / deviation", latents))
        parts.append(_curves(f"{name}: PSNR in pieces less that in one call, by frame, dB", psnr))
    return parts


def _all_clips(clips: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for clip in clips:
        figures = clip["figures"]
        crossed = figures["compatibility"]
        interpolated = figures["image_vae_interpolated"]
        rows.append(
            [
                f"{clip['key']}, clip {clip['clip_index']}",
                "image" if figures["num_frames"] == 1 else "moving" if figures["is_moving"] else "static",
                _decibels(figures["interpolation_psnr_db"]),
                _decibels(figures["video_vae"]["psnr_db"]),
                _decibels(interpolated["psnr_db"] if interpolated is not None else None),
                _decibels(crossed["image_decoder"]["psnr_db"] if crossed is not None else None),
            ]
        )
    return Table(
        "All clips",
        "PSNR in dB.",
        [
            "clip",
            "kind",
            "own key frames interpolated",
            *(_METHODS[name] for name in ("video_vae", "image_vae_interpolated")),
            "image decoder on its latents",
        ],
        rows,
    )


def _error_map(frames: Pixels, pictures: ClipPictures) -> Pixels:
    error = np.abs(frames.astype(np.int16) - pictures.original.astype(np.int16)).mean(axis=3, keepdims=True)
    amplified: Pixels = (error * _ERROR_GAIN).clip(0, 255).astype(np.uint8).repeat(3, axis=3)
    return amplified


def _jpeg_uri(frames: Pixels) -> str:
    """Frames (n, h, w, 3) side by side as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _curves(title: str, series: Mapping[str, Line]) -> str:
    """Lines over frame numbers as one SVG; told apart by colour, dashes and a legend."""
    last = max(x for line in series.values() for x, _ in line)
    low, high = _axis(min(map(_lowest, series.values())), max(map(_highest, series.values())))
    left, top, width, height = 44, 10, 596, 180
    legend_y = top + height + 40

    def place(x: float, y: float) -> str:
        return f"{left + width * x / max(last, 1):.1f},{top + height * (high - y) / (high - low):.1f}"

    parts = [
        f'<svg role="img" aria-label="{escape(_told(title, series))}" viewBox="0 0 660 {legend_y + 18 * len(series)}">',
        f"<title>{escape(title)}</title>",
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        y = top + height * (4 - step) / 4
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for x in range(0, math.floor(last) + 1, TEMPORAL_COMPRESSION):
        at = left + width * x / max(last, 1)
        parts.append(f'<text x="{at:.1f}" y="{top + height + 18}" text-anchor="middle">{x}</text>')
    for number, (label, line) in enumerate(series.items()):
        path = " ".join(place(x, y) for x, y in line)
        y = legend_y + 18 * number
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        parts.append(f'<line class="line s{number}" x1="{left}" x2="{left + 40}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(f'<text x="{left + 50}" y="{y}">{escape(label)}</text>')
    return "".join([f"<figure><figcaption>{escape(title)}</figcaption>", *parts, "</svg></figure>"])


def _axis(low: float, high: float) -> tuple[float, float]:
    """Round numbers that the values lie between."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-3)))
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    return bottom, top if top > bottom else bottom + step


def _lowest(line: Line) -> float:
    return min(y for _, y in line)


def _highest(line: Line) -> float:
    return max(y for _, y in line)


def _told(title: str, series: Mapping[str, Line]) -> str:
    ranges = [f"{label} {_lowest(line):.2f} to {_highest(line):.2f}" for label, line in series.items()]
    return f"{title}. " + "; ".join(ranges)


def _html_cell(title: str | None, cell: str) -> str:
    """A cell, or the title of its column, on the side where numbers are or where text is."""
    is_number = cell == _NOTHING or cell.removeprefix("-").replace(".", "", 1).isdigit()
    side = ' class="number"' if is_number else ""
    return f"<td{side}>{escape(cell)}</td>" if title is None else f'<th scope="col"{side}>{escape(title)}</th>'


def _html_table(table: Table, level: int = 2) -> str:
    first = table.rows[0] if table.rows else table.header
    head = "".join(_html_cell(title, below) for title, below in zip(table.header, first, strict=True))
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(_html_cell(None, cell) for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<h{level}>{escape(table.title)}</h{level}>{note}<div class="wide" tabindex="0" role="region" '
        f'aria-label="{escape(table.title)}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def facts(document: Mapping[str, Any]) -> list[str]:
    """What must be known to read the tables, a sentence each."""
    model, teacher, accounts, settings = (document[name] for name in ("model", "teacher", "accounts", "settings"))
    found = []
    if not model["is_trained"]:
        found.append("WARNING: the model is untrained (weights made from a seed): its figures mean nothing.")
    found.append(
        f"Model {model['name']} ({model['class']}, {model['num_parameters'] / 1e6:.2f} M parameters, "
        f"{model['num_encoder_parameters'] / 1e6:.2f} M of them in the encoder; "
        f"weights {model['weights_sha256'][:12]})."
    )
    if teacher is None:
        found.append("No image VAE was given: reconstruction only.")
    else:
        found.append(
            f"Image VAE {teacher['path']} ({teacher['class']}, {teacher['num_parameters'] / 1e6:.2f} M parameters), "
            f"{teacher['latent_channels']} latent channels."
        )
        scales = [(one["scaling_factor"], one["shift_factor"]) for one in (model, teacher)]
        if scales[0] != scales[1]:
            found.append(
                "WARNING: a diffusion model sees scale * (latent - shift), and the model's scale and shift "
                f"{scales[0]} are not the image VAE's {scales[1]}."
            )
    found.append(
        f"{accounts['num_clips']} clips of {accounts['num_videos_ok']} files from {settings['input']}: "
        f"{accounts['num_clips_moving']} moving, {accounts['num_clips_static']} static, "
        f"{accounts['num_images']} images; {accounts['num_videos_rejected']} files rejected"
        + ("; --limit was reached." if accounts["is_limited"] else ".")
    )
    found.append(
        f"Clips {', '.join(settings['buckets'])} at {_rate(settings['fps'])}; "
        f"{settings['compute_dtype']} on {settings['device']}. A clip is moving where its own frames 0, 4, 8, ..., "
        f"interpolated, give less than {settings['moving_below_db']:g} dB between them."
    )
    return found


def _reconstruction(summary: Mapping[str, Any]) -> Table:
    rows = []
    for group, figures in _present(summary):
        for method, label in _METHODS.items():
            measured = figures[method]
            if measured is not None:
                rows.append(
                    [
                        f"{group} ({figures['num_clips']})",
                        label,
                        _decibels(measured["psnr_db"]),
                        _decibels(measured["key_psnr_db"]),
                        _decibels(measured["between_psnr_db"]),
                        _number(measured["ssim"], 4),
                        _number(measured["lpips"], 4),
                        _number(measured["temporal_difference"], 3),
                    ]
                )
    return Table(
        "Reconstruction",
        "PSNR in dB on frames rounded to 0..255, mean of the frames' PSNRs; key frames are 0, 4, 8, ...; temporal "
        "error is mean |(x[t+1] - x[t]) - (y[t+1] - y[t])| in levels of 255, lower is steadier.",
        ["clips", "frames from", "PSNR", "key frames", "between", "SSIM", "LPIPS", "temporal error"],
        rows,
    )


def _compatibility(summary: Mapping[str, Any]) -> Table:
    groups = _present(summary)
    lines: list[tuple[str, Sequence[str], int]] = [
        ("image decoder on video latents, PSNR", ("compatibility", "image_decoder", "psnr_db"), 2),
        (
            "image decoder's ceiling: the image VAE on these frames",
            ("compatibility", "image_decoder", "ceiling_psnr_db"),
            2,
        ),
        (
            "image decoder, against the best frame of each group",
            ("compatibility", "image_decoder", "best_of_group_psnr_db"),
            2,
        ),
        ("video decoder on image latents, PSNR", ("compatibility", "video_decoder", "psnr_db"), 2),
        (
            "video decoder's ceiling: the video VAE on these frames",
            ("compatibility", "video_decoder", "ceiling_psnr_db"),
            2,
        ),
        ("video decoder, key frames only", ("compatibility", "video_decoder", "key_psnr_db"), 2),
        ("video latents to image latents, rms / deviation", ("latents", "to_image_vae"), 4),
        ("frame 0 alone to its image latent, rms / deviation", ("latents", "single_frame_to_image_vae"), 4),
        ("first latent to that of frame 0 alone, rms / deviation", ("latents", "first_to_single_frame"), 4),
        ("video VAE above key frames + interpolation, dB", ("above_interpolation_db",), 2),
    ]
    rows = []
    for label, path, digits in lines:
        cells = []
        for _, figures in groups:
            value: Any = figures
            for name in path:
                value = value[name] if value is not None else None
            cells.append(_number(value, digits))
        rows.append([label, *cells])
    return Table(
        "Compatibility with the image VAE",
        "Each VAE decodes the other one's latents. PSNR in dB; the image decoder is measured against frames 0, 4, 8, "
        "...",
        ["figure", *(f"{group} ({figures['num_clips']})" for group, figures in groups)],
        rows,
    )


def _channels(channels: Mapping[str, Any]) -> Table:
    lines = [
        ("deviation / deviation of the image VAE", "deviation_ratio"),
        ("absolute difference of means", "mean_difference"),
        ("correlation", "correlation_spread"),
    ]
    rows = [[label, *(_number(channels[name][key], 3) for key in ("median", "min", "max"))] for label, name in lines]
    rows.append(["squared error / variance, all channels", _number(channels["error_over_variance"], 3), "", ""])
    return Table(
        "Latents by channel",
        "Latents of the video VAE against those of the image VAE for frames 0, 4, 8, ..., over all clips.",
        [f"over {len(channels['mean'])} channels", "median", "smallest", "largest"],
        rows,
    )


def _seams(clips: Sequence[Mapping[str, Any]]) -> Table | None:
    probes = [clip["figures"]["probe"] for clip in clips if clip["figures"]["probe"] is not None]
    if not probes:
        return None
    rows = []
    for name, label in (("chunked", "chunks of {chunk_frames} + 1 frames"), ("tiled", "tiles of {tile_px} px")):
        cut = [probe[name] for probe in probes if probe[name] is not None]
        if cut:
            cells = [
                _number(_mean([one[key] for one in cut]), 4)
                for key in ("latent_rms", "psnr_db_difference", "frame_rms")
            ]
            rows.append([label.format(**cut[0]), str(len(cut)), *cells])
    flicker = [probe["still_flicker"] for probe in probes if probe["still_flicker"] is not None]
    rows.append(["flicker of a still clip", str(len(flicker)), "", "", _number(_mean(flicker), 4)])
    return Table(
        "Seams and steadiness",
        "A clip in pieces against the same clip in one call; a still clip repeats frame 0, its flicker is the mean "
        "change from frame to frame.",
        ["", "clips", "latent rms / deviation", "PSNR difference, dB", "frames, levels of 255"],
        rows,
    )


def _timing(timing: Mapping[str, Any] | None) -> Table | None:
    if timing is None:
        return None
    rows = [
        [
            half,
            _number(timing[f"{half}_ms_per_frame"], 2),
            _number(timing[f"image_vae_{half}_ms_per_frame"], 2),
            _number(timing[f"{half}_ratio"], 2),
        ]
        for half in ("encode", "decode")
    ]
    num_frames, height, width, _ = timing["clip_shape"]
    return Table(
        "Time",
        f"Milliseconds per frame at {width}x{height}x{num_frames}, medians of {timing['num_rounds']} interleaved "
        f"rounds, {timing['num_threads']} threads on {timing['device']}; the image VAE takes every frame.",
        ["", "video VAE", "image VAE", "times as fast"],
        rows,
    )


def _rejected(rejected: Sequence[Mapping[str, Any]]) -> Table:
    rows = [[entry["key"], entry["step"], entry["reason"], entry["message"]] for entry in rejected]
    return Table("Rejected", "", ["file", "step", "reason", "message"], rows)


def _present(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(group, summary[group]) for group in _GROUPS if summary[group] is not None]


def _rate(fps: float | str) -> str:
    return "the videos' own rate" if fps == "native" else f"{fps:g} frames per second"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _decibels(value: float | None) -> str:
    return _number(value, 2)


def _number(value: float | None, digits: int) -> str:
    # Adding zero makes of -0.0 what people write.
    return _NOTHING if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _plain(text: str) -> str:
    """Text that stays in its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
