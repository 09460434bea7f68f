# Image of the prunefront application: HTTP API, page, controller and every command.
#
#   docker build --build-arg TORCH_INDEX_URL=<index with torch's CPU wheels> --tag prunefront:cpu .
#   docker build --build-arg DEVICE=cuda --tag prunefront:cuda .
#
# The default package index carries torch's CUDA build alone, several GB of it, so the CPU image has to be told where
# its wheels are. The CUDA build brings its own CUDA libraries; the host needs only the driver.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG DEVICE=cpu
ARG TORCH_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN case "${DEVICE}:${TORCH_INDEX_URL}" in \
        cpu:?* | cuda:*) ;; \
        cpu:) echo "Name the index with torch's CPU wheels: --build-arg TORCH_INDEX_URL=..." >&2; exit 1 ;; \
        *) echo "DEVICE is cpu or cuda, but got '${DEVICE}'." >&2; exit 1 ;; \
    esac
RUN python -m venv /opt/prunefront
ENV PATH=/opt/prunefront/bin:$PATH
# torch and torchvision first and alone: they change least and weigh most, so later layers rebuild without them.
# hadolint ignore=DL3013
RUN pip install "torch>=2.6" torchvision ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"}
WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY prunefront ./prunefront
COPY latency_tables ./latency_tables
COPY workers ./workers
COPY search ./search
COPY store ./store
COPY service ./service
# Editable, because the wheel leaves the application out (docs/decisions/0001-what-the-wheel-carries.md).
RUN pip install --editable ".[app,lmdb]"

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime
# g++ serves the runtime "compile" on CPUs and builds what merges tokens there; libgomp comes with it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home prunefront \
    && install --directory --owner prunefront --group prunefront \
        /var/lib/prunefront /var/lib/prunefront/checkpoints /var/lib/prunefront/tables /datasets
COPY --from=build /opt/prunefront /opt/prunefront
COPY --from=build /app /app
ENV PATH=/opt/prunefront/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PRUNEFRONT_DATA_DIR=/var/lib/prunefront \
    PRUNEFRONT_DATA_ROOTS=/datasets
WORKDIR /var/lib/prunefront
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["prunefront"]
CMD ["serve"]
