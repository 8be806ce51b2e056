"""An estimate as text for people: a line for each thing that it says.

Not where anything is estimated (`estimate`). Called by `run`, which shows the lines.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.estimate import Estimate
from pipeline.progress import crew_in_words, duration_text, size_text


def lines_of(found: Estimate) -> list[str]:
    """The estimate for people, a line for each thing that it says."""
    rows = [("dry run", f"nothing is written; took {found.took_s:.0f} s")]
    if not found.num_shards:
        rows.append(("to do", f"nothing: all {found.num_shards_done_before:,} shards are decided"))
        return _aligned(rows)
    about = "" if found.is_whole else "about "
    before = f"; {found.num_shards_done_before:,} are decided and not counted" if found.num_shards_done_before else ""
    later = f"; {found.num_shards_beyond_limit:,} are left by --limit" if found.num_shards_beyond_limit else ""
    rows.append(("to do", f"{found.num_shards:,} shards{before}{later}"))
    of_all = "all there are" if found.is_whole else f"of about {found.num_videos or 0:,}"
    rows.append(
        (
            "seen",
            f"{found.num_videos_seen:,} videos and images, {of_all}, in {found.num_shards_seen:,} of the shards; "
            f"{size_text(found.num_bytes_seen)}",
        )
    )
    if found.num_videos is not None:
        hours = "" if found.video_hours is None else f", {found.video_hours:,.2f} hours of video"
        rejected = f", {about}{found.num_videos_rejected:,} of them rejected" if found.num_videos_rejected else ""
        rows.append(
            (
                "input",
                f"{about}{found.num_videos:,} videos and images{_between(found.num_videos_range)}{hours}{rejected}",
            )
        )
        rows.append(
            ("clips", f"{about}{found.num_clips:,}{_between(found.num_clips_range)}, {found.num_frames or 0:,} frames")
        )
        rows += [("", f"{bucket}  {number:,}") for bucket, number in found.clips.items()]
        rows += [
            ("rejected", f"{about}{entry['num']:,} {reason}: {entry['meaning']}; {entry['example']}")
            for reason, entry in found.rejections.items()
        ]
    if found.num_bytes_out is not None:
        beside = f", and {size_text(found.num_bytes_embeddings)} of embeddings" if found.num_bytes_embeddings else ""
        rows.append(("output", f"{about}{size_text(found.num_bytes_out)} in {found.num_files_out:,} files{beside}"))
    for place in sorted(found.requests):
        sent = ", ".join(f"{number:,} {kind}" for kind, number in found.requests[place].items() if number)
        rows.append(("requests", f"to the {place}: {sent}"))
    crew = crew_in_words(found.num_actors, found.cpus_per_actor, found.gpus_per_actor)
    if found.duration_s is None or found.start_s is None:
        rows.append(("time", f"not known, for {crew}"))
    else:
        low_high = ""
        if found.duration_range_s is not None and not found.is_whole:
            low_high = " ({} to {})".format(*map(duration_text, found.duration_range_s))
        waits = {"encoding": "encoders", "decoding": "decoders", "cores": "cores, which encode and decode"}
        rows.append(
            (
                "time",
                f"about {duration_text(found.duration_s)}{low_high} with {crew}, "
                f"{duration_text(found.start_s)} of it to start; it waits for {waits[str(found.limited_by)]}",
            )
        )
        per_clip = ", ".join(
            f"{bucket} {seconds:.3g} s a clip{'' if bucket in found.measured else ' (scaled)'}"
            for bucket, seconds in found.encode_s_per_clip.items()
        )
        decoding = f"decoding {found.decode_cpu_s:,} CPU seconds"
        embedding = f"; embedding {found.embed_s:,.1f} s" if found.embed_s else ""
        rows.append(("", f"measured here ({found.device_name}): {per_clip}; {decoding}{embedding}"))
        hours_of = (
            f"{found.gpu_hours:,.3f} GPU hours" if found.gpus_per_actor else f"{found.actor_hours:,.3f} actor hours"
        )
        price = "" if found.price is None else f", price {found.price:,.2f}"
        if found.price_range is not None and not found.is_whole:
            price += " ({:,.2f} to {:,.2f})".format(*found.price_range)
        rows.append(("cost", hours_of + price))
    rows += [("advice", text) for text in found.advice]
    rows += [("note", text) for text in found.notes]
    return _aligned(rows)


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{title:<10}{text}" for title, text in rows]


def _between(limits: tuple[int, int] | None) -> str:
    return "" if limits is None or limits[0] == limits[1] else f" ({limits[0]:,} to {limits[1]:,})"
