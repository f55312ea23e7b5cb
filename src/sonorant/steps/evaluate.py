"""The step `evaluate`."""

from __future__ import annotations

from sonorant.config import EvaluateConfig
from sonorant.steps.step import In, Metrics, Out, step


@step
def evaluate(config: EvaluateConfig, *, corpus: In, model: In, report: Out, previous: In | None = None) -> Metrics:
    """Measure the published model against its baselines.

    Writes report.html, metrics.json (system, score, value), estimates.npz (what each utterance has to do with a
    score; `sonorant compare` reads it), where there are phones confusion.csv (which the model's units take for which),
    where ABX is scored phones.item and triphones.item (on what: of any context, and in context), where there are
    probes layers.csv (how much of each layer each reads) and, for DVC's plots, scores.csv (a row for each system) and
    training.csv (a row for each logged update). The metrics returned are named system.score.
    """
    import json

    from sonorant.artifacts import read_record
    from sonorant.data.corpus import read_corpus
    from sonorant.evaluation.estimates import write_estimates
    from sonorant.evaluation.report import render
    from sonorant.steps.contenders import contenders
    from sonorant.steps.items import choose_items
    from sonorant.steps.scoring import score
    from sonorant.steps.summary import describe, list_confusions, list_shares, print_table, write_csv
    from sonorant.training.journal import read_journal

    utterances = read_corpus(corpus, config.split, config.source)
    items = choose_items(config.items, utterances)
    everything = read_corpus(corpus)
    digest = read_record(corpus, "corpus")["digest"]
    scored = [
        score(config, contender, utterances, items)
        for contender in contenders(config, model, previous, utterances, everything, digest)
    ]
    journal = read_journal(model / "journal.jsonl")
    page = describe(config, corpus, model, scored, utterances, items, everything, journal)
    (report / "report.html").write_text(render(page))
    metrics = {system.key: dict(system.scores) for system in page.systems}
    (report / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    write_estimates(report, page.systems)
    write_csv(report / "scores.csv", [{"system": name, **scores} for name, scores in metrics.items()])
    write_csv(report / "training.csv", journal)
    items.write(report)
    if page.joint is not None and page.joint.num_frames:
        write_csv(report / "confusion.csv", list_confusions(page.joint))
    if any(system.shares for system in page.systems):
        write_csv(report / "layers.csv", list_shares(page.systems))
    print_table(page, report)
    return {f"{name}.{key}": value for name, scores in metrics.items() for key, value in scores.items()}
