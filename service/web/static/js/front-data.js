// What the page reads out of a front document and the candidates; no drawing here.

export const FIDELITIES = ["screened", "evaluated", "finetuned"];

// Every point that can be selected, fastest first, each once.
export function pointsOf(front) {
  const seen = new Map();
  for (const point of [...front.points, ...front.marks, ...(front.dense ? [front.dense] : [])]) {
    if (!seen.has(point.trial)) seen.set(point.trial, point);
  }
  return [...seen.values()].sort((a, b) => a.measured_ms - b.measured_ms);
}

// The most accurate point of the front, or dense, within a latency; the faster of equals.
export function bestWithin(front, budget) {
  const fitting = [...front.points, ...(front.dense ? [front.dense] : [])].filter((point) => point.measured_ms <= budget);
  fitting.sort((a, b) => b.top1 - a.top1 || a.measured_ms - b.measured_ms);
  return fitting[0] ?? null;
}

export function fidelitiesOf(trials) {
  const reached = new Set(trials.filter((trial) => trial.measurements.length).flatMap((trial) => trial.evaluations.map((item) => item.fidelity)));
  return FIDELITIES.filter((name) => reached.has(name));
}

const isOfFront = (front) => (item) =>
  item.device === front.device && item.runtime === front.runtime && item.dtype === front.dtype && item.batch_size === front.batch_size;

// Candidates with a sound measurement on the front's device: {trial, label, predicted_ms, measured_ms, iqr_ms, top1}.
export function candidatesOf({ front, trials }) {
  return trials.flatMap((trial) => {
    const measured = trial.measurements.filter((item) => item.state === "ok" && isOfFront(front)(item)).at(-1);
    if (!measured) return [];
    const accuracy = trial.evaluations.filter((item) => item.fidelity === front.fidelity && item.split === front.split).at(-1);
    return [
      {
        trial: trial.number,
        label: trial.label,
        predicted_ms: trial.predicted_ms,
        measured_ms: measured.median_ms,
        iqr_ms: measured.iqr_ms,
        top1: accuracy?.top1 ?? null,
      },
    ];
  });
}

export function countCandidates(trials) {
  const count = (isCounted) => trials.filter(isCounted).length;
  return {
    candidates: trials.length,
    measured: count((trial) => trial.measurements.some((item) => item.state === "ok")),
    noisy: count((trial) => trial.measurements.length && trial.measurements.every((item) => item.state === "noisy")),
    failed: count((trial) => trial.state === "failed"),
    finetuned: count((trial) => trial.evaluations.some((item) => item.fidelity === "finetuned")),
  };
}
