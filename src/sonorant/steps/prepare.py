"""The step `prepare`."""

from sonorant.config import PrepareConfig
from sonorant.steps.step import Metrics, Out, Scratch, step


@step
def prepare(config: PrepareConfig, *, corpus: Out, scratch: Scratch) -> Metrics:
    """Check and resample the speech of all sources, and write a corpus whose splits share no speaker."""
    from sonorant.data.assembly import check_enough, choose_splits, name_apart, settle
    from sonorant.data.corpus import REFUSED, Refused, Taken, write_corpus, write_refused
    from sonorant.data.progress import shown_progress
    from sonorant.data.sources import Entry, describe_source, read_source

    offered: list[Entry] = []
    for source in config.sources:
        with shown_progress(f"prepare: making {source.name}", "utterances") as report:
            entries = read_source(source, scratch / "sources" / source.name, config.num_workers, report)
        offered += choose_splits(entries, source, config.seed)
    with shown_progress("prepare: checking", "rows") as report:
        settled = list(settle(name_apart(offered, config), config, scratch / "shards", report))
    taken = [one for one in settled if isinstance(one, Taken)]
    refused = [one for one in settled if isinstance(one, Refused)]
    write_refused(scratch / REFUSED, refused)
    check_enough(taken, refused, config, scratch)
    kinds = {source.name: describe_source(source) for source in config.sources}
    stats = write_corpus(corpus, taken, refused, kinds)
    return {
        "hours": stats["hours"],
        "utterances": float(stats["utterances"]),
        "speakers": float(stats["speakers"]),
        "refused": float(stats["refused"]["rows"]),
        "refused_share": stats["refused"]["share"],
    }
