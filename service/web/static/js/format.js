// Numbers as people read them: percentages here and nowhere else, the API speaks ratios.

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : value >= 1 ? 2 : 3;
  return `${value.toFixed(digits)} ms`;
}

export const percent = (ratio, digits = 1) => (ratio === null || ratio === undefined ? "–" : `${(100 * ratio).toFixed(digits)} %`);

export function points(ratio) {
  if (ratio === null || ratio === undefined) return "–";
  const value = 100 * ratio;
  return `${value > 0 ? "+" : value < 0 ? "−" : "±"}${Math.abs(value).toFixed(2)} pt`;
}

export const interval = (pair) => (pair ? `${(100 * pair[0]).toFixed(1)} to ${(100 * pair[1]).toFixed(1)} %` : "");
export const times = (value) => (value === null || value === undefined ? "–" : `${value.toFixed(2)} ×`);

export function macs(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1e9 ? `${(value / 1e9).toFixed(2)} G` : `${(value / 1e6).toFixed(1)} M`;
}

const STEPS = [["day", 86400], ["hour", 3600], ["minute", 60]];
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

export function ago(iso) {
  const seconds = (new Date(iso).getTime() - Date.now()) / 1000;
  for (const [unit, length] of STEPS) {
    if (Math.abs(seconds) >= length) return relative.format(Math.round(seconds / length), unit);
  }
  return "just now";
}

export function duration(fromIso, toIso) {
  const seconds = Math.max(0, Math.round((new Date(toIso) - new Date(fromIso)) / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

export function progressText(progress) {
  const share = progress.total > 0 ? `${Math.round((100 * progress.done) / progress.total)} %` : "";
  return [progress.message, share].filter(Boolean).join(" · ");
}
