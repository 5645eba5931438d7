"""Batch scoring of screenshots on Ray and TensorFlow. Read the modules in this order; each imports only from above.

Domain: no clock, network, Ray or TensorFlow.
    errors.py         what can go wrong: exit codes and HTTP statuses
    partitions.py     date and model version <-> location
    yaml_files.py     YAML files that people write, without values that change or get lost
    config.py         one frozen class per job; its docstrings are the documentation of every flag
    records.py        the column contract of everything written, and the codes of the quarantine
    redaction.py      secrets taken out of what is shown or stored
    plan.py           listing -> frozen plan of shards; which of them are pending
    request_errors.py what can be wrong with an HTTP request, each with its status
    json_bodies.py    JSON that strangers send, bounded in depth, memory and time
    rest_bodies.py    the bodies that clients of TensorFlow Serving's REST API send
    protocol.py       TensorFlow Serving's REST: routes, answers, statuses
    encoded_bodies.py gzip and deflate bodies, bounded
    infer_bodies.py   the infer bodies of the Open Inference Protocol: JSON and binary tensors
    triton_extensions.py what Triton's own clients ask for beyond it: classes, configuration, index, statistics
    open_inference.py the Open Inference Protocol v2: routes and answers

Bytes in, bytes out.
    user_folders.py   folders that any user may write, without a home too
    machine_errors.py what this machine lacks, whichever library met it first
    input_filters.py  which names below an input are images
    content_encoding.py objects stored with Content-Encoding: gzip, read as what they were before
    storage_options.py requester pays, encryption, addressing: what holds for the stores of this process
    storage_base.py   the interface of a store, and what its implementations share
    storage_retry.py  which failures are tried again, how often and how long
    storage_pages.py  a page of an S3 listing as Arrow columns
    storage_ranges.py a long S3 listing in order, many ranges of names at once
    storage_clients.py the two S3 clients of a store
    storage_s3.py     S3
    local_walk.py     a local folder as sorted rows, links as far as they are followed
    storage.py        local folders; open_store(uri)
    stores.py         the stores of a job: one per bucket and process
    memory.py         what a process does with memory that it frees
    image_formats.py  which format a file has, from its first bytes
    tiff_files.py     the first page of a TIFF, rebuilt with nothing but its pixels
    avif_files.py     the still image of an AVIF, its size and how much there is to decode
    image_files.py    the size, orientation and pixel data of a file, before anything is decoded
    image_bodies.py   an HTTP body that is an image, or a form with one
    openapi_schemas.py the JSON of both protocols as JSON Schema
    openapi.py        the OpenAPI document of the endpoint
    images.py         encoded bytes -> uint8 RGB of the model's size, or a row failure
    decoders.py       the same in child processes: a decoder that crashes costs one file
    lease.py          who works on a partition now
    tallies.py        counts, score histogram and examples of a part; they add up
    sorted_rows.py    streams of tables sorted by uri, walked in step
    manifests.py      what a committed shard and a finished generation say of themselves
    outputs.py        commit a part, its quarantine and the manifest; read back what is committed
    manifest_text.py  the bytes of a manifest as UTF-8 text, unpacked within bounds
    manifest_csv.py   CSV -> a table whose cells are the text of the file
    manifest_values.py values of any type as text
    manifest_files.py a manifest -> a table of text: CSV, JSON Lines, Parquet, a folder of Parquet
    allowed_uris.py   what a manifest may name
    object_lookup.py  etags and sizes of many objects: pages of listings, HEADs for the rest
    manifest_listing.py a manifest -> its sorted listing
    s3_inventory.py   a report of S3 Inventory -> its sorted listing
    inputs.py         INPUT -> sorted (uri, etag, size_bytes)
    generations.py    what a finished partition owes to its input as it is now; what that supersedes
    runs.py           list partitions, compare two, write one as a single file

Models.
    classic_nets.py   the tutorial's nets, LeNet-5, AlexNet and a small ResNet
    architectures.py  table: name -> builder, size, preprocessing
    artifact.py       the model bundle, its versions and aliases
    node_files.py     files that a node fetches once
    weights.py        start weights, fetched once per node and checked
    augmentation.py   photo and screenshot augmentation as layers
    model.py          definition -> Keras classifier of uint8 pixels; freeze, unfreeze
    predictor.py      artifact -> scores for a uint8 batch: the only inference path
    exif_graph.py     the EXIF orientation of a JPEG as TensorFlow operations
    export.py         Keras model -> published artifact, engines measured first

Jobs.
    ray_session.py    a connected Ray: a cluster, or a local one for this job
    placement.py      CPUs and GPUs that are asked for and not there: refused, or waited for aloud
    known_sets.py     CIFAR-10 and Oxford 102 Flowers as they are distributed
    reader.py         uri -> bytes -> pixels or a row failure
    labelled_rows.py  uri, class name, group, split of every image, as the data say
    near_duplicates.py images that look alike
    inspection.py     all labelled images read once: the unreadable, and those that look alike
    splitting.py      which side of the split each image is on
    dataset.py        labelled images -> split and pixels
    guards.py         the well-known mistakes as named checks
    preview.py        a sheet of augmented images
    batches.py        the input pipeline of a training worker
    losses.py         the loss of single images, weights of classes
    train_callbacks.py optimizers, schedules and Keras callbacks of a phase
    collectives.py    the group of workers: agree, sum, time out
    feature_cache.py  a frozen backbone computed once per image
    train_state.py    what a checkpoint holds
    train_loop.py     the data-parallel epoch loop
    train_worker.py   what one Ray Train worker does: load, train, publish
    train_ray.py      a training handed to Ray Train
    train.py          configuration -> a run, checked, resumed, published
    metrics.py        figures of scores against the truth, with intervals
    judged.py         what an evaluation is made of
    page.py           what the HTML pages share
    plots.py          line and dot charts, confusion matrix
    evaluation_page.py an evaluation as HTML
    evaluate.py       labelled images scored by a version; figures, page, JSON
    calibration.py    temperature, and a threshold at a false-positive budget
    promotion.py      the release gate
    comparison_rows.py what a comparison of trainings is made of
    compare_page.py   a comparison of trainings as HTML
    compare.py        several trainings on one split, measured alike
    comparison.py     two nights side by side: what changed, and whether it matters
    charts.py         histogram and throughput as inline SVG
    report_page.py    the run report as HTML
    report.py         thumbnails and the night before -> _report.html
    stages.py         fetch and decode -> predict -> commit, for one shard
    runners.py        the stages over all shards in this process
    ray_runner.py     the same by Ray Data over a cluster
    planning.py       what a run owes: frozen settings, and the plan that is open or comes next
    quarantine_limit.py too many unreadable files: what to do about them
    score.py          plan -> pending shards -> manifest
    nightly_status.py what each date of a look-back window owes; the status object of nightly runs
    readiness.py      whether the screenshots of a date are complete
    webhook.py        one JSON message to an allow-listed https address
    nightly_calendar.py the dates of the look-back window as they stand, for people
    nightly.py        every date that owes a run is scored, oldest or newest first
    retention.py      old partitions removed, manifest first
    schedule_files.py timer, cron line and Kubernetes manifests that start nightly, as text
    schedule.py       the same installed, shown, removed
    explain.py        occlusion heat map of one image
    page_files.py     the page at / as it is sent
    auth.py           API keys: a file of hashes, and whose key a request brought
    endpoint_metrics.py what the endpoint counts, added up over replicas, for Prometheus
    model_counts.py   what was counted of each model version, read back from the metrics
    log_stream.py     the log of all processes of an endpoint on one standard error
    access_log.py     one line of JSON per request
    batcher.py        rows of many requests -> calls of the model
    served_models.py  the versions a replica answers with; aliases followed
    answers.py        what is asked of a model -> the answer
    gateway.py        Ray's own HTTP answers in our form; a lost replica's request tried again
    haproxy.py        Ray's HAProxy ingress, made safe
    endpoint.py       the ASGI application: keys, limits, deadlines around every answer
    serve.py          replicas of it on Ray Serve
    doctor_finding.py what a check says: level, what was seen, how to mend it
    doctor_machine.py packages, processors, disk, time-outs of this machine
    doctor_security.py open ports, the token, HAProxy's socket
    doctor_storage.py storage answers, keeps what it is given, refuses what it must
    doctor_serve_yaml.py what Ray Serve accepts in silence in its YAML
    doctor_cluster_yaml.py what `ray up` would only say on AWS, or never
    doctor.py         all of it in a few seconds, each finding with its mend
    submit.py         a job as it is handed to a cluster, at most once
    submit_client.py  Ray's job server: submit, watch, stop
    drawing.py        labelled synthetic screenshots
    drawn_files.py    folders of them, and hostile files
    flags.py          configuration class -> command-line flags
    config_reference.py CONFIGURATION.md from the configuration classes
    console.py        progress and tables
    console_evaluation.py evaluations, calibrations, promotions
    console_training.py findings of the guards, comparisons
    cli_models.py     the verbs about models
    cli_operate.py    the verbs that run every night: nightly, schedule, runs prune
    cli_serve.py      the verbs about the endpoint
    cli_doctor.py     the verb doctor
    cli_submit.py     the verbs that hand jobs to a cluster
    demo.py           the whole line on drawn screenshots
    cli.py            verbs and exit codes only
"""

__version__ = "0.1.0"
